"""Every setting of a run, and the presets: the same code, other numbers.

    python config.py            # where the presets differ, as a table

`tiny` is what a laptop trains in a few minutes, `small` trains adapters on one GPU, `paper` is the
published recipe on eight. A preset is a `Config`; each field is a flag of train.py, so each of the
paper's ablations is one, too. Sources of `paper`: [P] public summaries of the paper (not its
pages), [D] the first author's public development code, [own] neither says.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from engine.weights import read_recipe
from files.ranges import Amount, Count, NotNegative, Observed, Positive, Share, check_ranges
from reward import RewardConfig
from rollout import RolloutConfig


# fmt: off
@dataclass
class Config(RolloutConfig, RewardConfig):
    """Defaults are the tiny preset; `small` and `paper` change what they say below."""

    # where things are
    init: str = "assets/tiny-warmstart"   # Hugging Face name or folder of a Qwen2.5-VL
    kb: Path = Path("data/kb")
    text_url: str = ""                    # address of a text server (knowledge/server.py), not kb
    image_url: str = ""                   # address of an image server; may be the same
    index_device: Literal["cpu", "gpu"] = "cpu"  # memory that ranks share, or each rank's own GPU
    data: Path = Path("data/mmhops")
    images: Path | None = None            # INFOSEEK, E-VQA: where their pictures are
    qtypes: Path | None = None            # INFOSEEK: its file of question types
    mode: Literal["agent", "text-only"] = "agent"  # text-only: captions for pictures, text search
    captions: Path | None = None          # …which evaluation/caption.py wrote
    limit: int | None = None              # train on this many questions only
    shuffle_seed: int | None = None       # which ones: drawn with this seed, else the first
    out: Path = Path("runs/tiny")
    resume: bool = False                  # go on from OUT/latest; a new folder simply starts
    change: tuple[str, ...] = ()          # settings that --resume may change
    plan: bool = False                    # train nothing, say what a run takes (engine/cost.py)
    plan_gpus: Count = 8                  # …on this many
    plan_gpu_gb: Positive = 80.0          # …with this much memory each
    plan_mfu: Share = 0.4                 # …at this utilisation
    plan_bandwidth: Positive = 2.0        # …decoding at this many TB/s
    # how long
    steps: Amount = 20
    max_minutes: NotNegative = 5.0        # stop after this much sampling and updating; 0: no limit
    seed: int = 0
    eval_every: Count = 5                 # steps
    eval_questions: Count = 200           # validation questions of the evaluations in between
    save_every: Count = 10                # steps; the curves are drawn then, too
    keep: Count = 2                       # newest checkpoints to keep
    # sampling: short observations, as sequence length is what the tiny preset spends its time on
    temperature: Positive = 1.0           # training samples
    max_turn_tokens: Count = 64
    max_obs_tokens: Observed = 84
    max_tokens: Count = 600
    topk: Count = 2                       # as the authors' training script
    instructions: str = ""                # the tiny policy was never taught any
    questions_per_step: Count = 16        # over all ranks
    max_refills: Amount = 1               # more rounds of sampling when groups were dropped
    sampler: Literal["shared", "generate", "endpoint"] = "shared"  # who writes: engine/samplers.py
    endpoint: str = ""                    # …addresses of inference servers: engine/served.py
    endpoint_every: Count = 1             # …which get new weights every so many steps
    endpoint_reload: tuple[str, ...] = (  # …by these calls: a path, and what is sent to it
        '/collective_rpc {"method": "reload_weights"}', "/reset_prefix_cache"
    )
    keep_surplus: bool = True             # groups beyond the need wait for the next step
    rollout_rows: Count = 256             # responses sampled at once per rank: they fill a GPU
    # updates
    updates_per_step: Count = 2           # optimizer steps per step
    micro_tokens: Count = 12_000          # tokens per forward pass; a longer response stands alone
    share_prompt: bool = True             # compute a prompt once for its G responses
    lr: NotNegative = 1e-4
    warmup_steps: Amount = 5
    weight_decay: NotNegative = 0.0
    beta2: Share = 0.99
    max_grad_norm: Positive = 1.0
    eps_low: NotNegative = 0.2
    eps_high: NotNegative = 0.28
    dual_clip: NotNegative = 0.0          # 3: a token of negative advantage A costs at most -3·A
    recompute_logprobs: bool = False      # old log-probs of this step's groups by the training pass
    max_rollout_ratio: NotNegative = 0.0  # truncated importance weights of recomputed ones; 0: none
    dynamic_sampling: bool = True         # drop groups that teach nothing; an ablation keeps them
    mask_retrieved: bool = True           # no loss on what was retrieved; an ablation trains on it
    token_level_loss: bool = True         # one mean over all tokens; an ablation: over responses
    max_bad_steps: Count = 5              # steps in a row that were not finite: the run gives up
    # numerics and memory
    dtype: str = "float32"                # compute; master weights are always float32
    attn: str = "auto"                    # of the vision tower: see model.load_policy
    activation_checkpointing: bool = False
    offload: bool = False                 # weights, gradients, optimizer: in CPU memory when idle
    gather_weights: bool = True           # whole weights on each GPU to sample; else in lockstep
    lora_rank: Amount = 0                 # train adapters of this rank (peft), not the weights
    freeze_vision: bool = False
    # besides metrics.jsonl
    tensorboard: bool = False
    wandb: str = ""                       # project to log to, where wandb is installed
    peak_tflops: NotNegative = 0.0        # of one device, for the MFU; 0: by its name, if known


TINY = Config()
PAPER = dict(
    init="Qwen/Qwen2.5-VL-7B-Instruct",      # [P][D], all weights trained
    kb=Path("data/MMhops-KB"), data=Path("data/MMhops"), out=Path("runs/paper"),
    group_size=8,                            # [P] G
    max_turns=4,                             # [P] T
    temperature=1.0, top_p=0.99,             # [D]
    max_turn_tokens=512,                     # [D]
    max_obs_tokens=1024,                     # [D]
    max_tokens=4096,                         # [D]
    min_pixels=100_352, max_pixels=401_408,  # [D]
    max_prompt_tokens=6144,                  # [D]
    topk=3,                                  # [P] (the authors' training script: 2 [D])
    image_topk=1,                            # [D] the nearest article's title
    instructions=RolloutConfig.instructions, # [D] in our words
    alpha=1.0, beta=1.0, gamma=0.25,         # [D]; the paper does not say
    overlong_buffer=0,                       # [D] off
    steps=85, max_minutes=0,                 # [D] 21,777 questions / 256, as if all were kept
    questions_per_step=256,                  # [D] prompts per rollout
    max_refills=9,                           # [D] ten rounds of sampling in all
    updates_per_step=4,                      # [D] of 64 prompts
    lr=1e-6, warmup_steps=0,                 # [P][D]
    weight_decay=1e-2, beta2=0.999,          # [D] AdamW
    max_grad_norm=1.0,                       # [D]
    eps_low=0.2, eps_high=0.28,              # [D] clip-higher; no KL penalty [D]
    recompute_logprobs=True,                 # [own] ratios of two training passes, not of samplers
    max_rollout_ratio=2.0,                   # [own] Yao et al. 2025
    dtype="bfloat16", activation_checkpointing=True,  # [own]
    micro_tokens=16_384, rollout_rows=128,   # [own] what fits beside the weights in 80 GB
    eval_every=10, eval_questions=256, save_every=5,  # [own]
)
# One GPU of 24 to 80 GB: adapters on a frozen bfloat16 model. Learning rate and batch as usual for
# LoRA, not the paper's.
SMALL = PAPER | dict(
    init="Qwen/Qwen2.5-VL-3B-Instruct", out=Path("runs/small"),
    lora_rank=64, freeze_vision=True,
    lr=1e-5, weight_decay=0.0,
    questions_per_step=32, steps=400, max_refills=3, updates_per_step=2,
    micro_tokens=8192, rollout_rows=48,
)
PRESETS = {"tiny": TINY, "small": Config(**SMALL), "paper": Config(**PAPER)}
# fmt: on


def check_config(cfg: Config, ranks: int):
    """Raises ValueError for settings that cannot be trained with on so many ranks."""
    check_ranges(cfg)
    if cfg.questions_per_step % ranks:
        raise ValueError(
            f"--questions-per-step {cfg.questions_per_step} cannot be shared by {ranks} ranks"
        )
    if cfg.group_size * cfg.questions_per_step < 2 or cfg.group_size < 1:
        raise ValueError(
            f"--group-size {cfg.group_size}, --questions-per-step {cfg.questions_per_step}: "
            "an advantage needs at least two responses"
        )
    if cfg.group_size == 1 and cfg.dynamic_sampling:
        raise ValueError(
            "--group-size 1 needs --no-dynamic-sampling: a single reward is always like all others"
        )
    if not cfg.mask_retrieved and not cfg.recompute_logprobs:
        raise ValueError(
            "--no-mask-retrieved needs --recompute-logprobs: the rollout knows no "
            "log-probabilities of what it did not sample"
        )
    if cfg.sampler == "generate" and not cfg.gather_weights:
        raise ValueError("--sampler generate needs whole weights: leave out --no-gather-weights")
    served = cfg.sampler == "endpoint"
    if served and not (cfg.endpoint and cfg.recompute_logprobs and cfg.temperature == 1):
        raise ValueError(
            "--sampler endpoint needs --endpoint, --recompute-logprobs and --temperature 1: a "
            "server's log-probabilities are not the trained policy's, and are at temperature 1"
        )
    if served and (cfg.lora_rank or not cfg.gather_weights):
        raise ValueError("--sampler endpoint serves whole weights: no adapters, no lockstep")
    if (cfg.out / "metrics.jsonl").exists() and not cfg.resume:
        raise ValueError(
            f"{cfg.out} holds a run already; go on with it by --resume, or name another folder "
            "with --out"
        )


def saved_settings(ckpt: Path | None) -> tuple[RolloutConfig, RewardConfig]:
    """The settings of a checkpoint's training, by its recipe.json. Without one: the paper's."""
    saved = (read_recipe(ckpt) if ckpt else {}) or asdict(PRESETS["paper"])
    if saved.get("sampler") == "endpoint":  # an evaluation asks no server for these weights
        del saved["sampler"]

    def settings(kind: type):
        return kind(**{f.name: saved[f.name] for f in fields(kind) if f.name in saved})

    return settings(RolloutConfig), settings(RewardConfig)


def differences() -> list[tuple[str, ...]]:
    """(field, its value in each preset) of the fields whose values differ."""
    settings = [asdict(preset) for preset in PRESETS.values()]
    rows = [(name, *(str(values[name]) for values in settings)) for name in settings[0]]
    return [row for row in rows if len(set(row[1:])) > 1]


if __name__ == "__main__":
    from rich.console import Console
    from rich.table import Table

    table = Table("", *PRESETS)
    for name, *values in differences():
        table.add_row(name, *(value[:40] for value in values))
    Console(width=100).print(table)
