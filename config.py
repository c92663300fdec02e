"""Every setting of a run, and the presets: the same code, other numbers.

`tiny` is what a laptop trains in ten minutes, `small` adapters on one GPU, `paper` the published recipe on eight. A preset is
a `Config`; each field is a flag of `train.py`, so each ablation of the paper is one, too. Where `paper` names a source:
[P] the paper, [D] the first author's public development code, [own] neither says.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from reward import RewardConfig
from rollout import RolloutConfig


@dataclass
class Config(RolloutConfig, RewardConfig):
    """Defaults are the tiny preset; `small` and `paper` change what they say below."""

    # fmt: off
    # where things are
    init: str = "assets/tiny-warmstart"   # Hugging Face name or folder of a Qwen2.5-VL
    kb: Path = Path("data/kb")
    text_url: str = ""                    # search over HTTP instead (knowledge/server.py): the servers' addresses,
    image_url: str = ""                   # which may be the same
    data: Path = Path("data/mmhops")
    images: Path | None = None            # INFOSEEK, E-VQA: where their pictures are
    qtypes: Path | None = None            # INFOSEEK: its file of question types
    limit: int | None = None              # train on this many questions only,
    shuffle_seed: int | None = None       # drawn with this seed; otherwise the first ones
    out: Path = Path("runs/tiny")
    resume: bool = False                  # go on from OUT/latest; a new folder simply starts
    # only say what a run would take (engine/cost.py), on
    plan: bool = False
    plan_gpus: int = 8
    plan_gpu_gb: float = 80.0
    plan_mfu: float = 0.4                 # utilisation
    plan_bandwidth: float = 2.0           # TB/s that decoding reads
    # how long
    steps: int = 150
    max_minutes: float = 9.5              # stop after this much rollout and update time; 0: no limit
    seed: int = 0
    eval_every: int = 25
    eval_questions: int = 200             # validation questions of the evaluations in between
    save_every: int = 25
    keep: int = 2                         # newest checkpoints to keep
    # sampling (the tiny preset reads short observations: sequence length is what its minutes are spent on)
    max_turn_tokens: int = 48
    max_obs_tokens: int = 84
    max_tokens: int = 600
    topk: int = 2                         # as the authors' training script
    instructions: str = ""
    questions_per_step: int = 16          # over all ranks
    max_refills: int = 0                  # more rounds of sampling when groups were dropped
    rollout_rows: int = 256               # responses of a rank that are sampled at once: their KV cache is what fills a GPU
    # updates
    updates_per_step: int = 2
    micro_tokens: int = 12_000            # tokens of a forward pass; a longer response stands alone
    share_prompt: bool = True             # compute a question's prompt once for its G responses
    lr: float = 5e-5
    warmup_steps: int = 5
    weight_decay: float = 0.0
    beta2: float = 0.99
    max_grad_norm: float = 1.0
    eps_low: float = 0.2
    eps_high: float = 0.28
    recompute_logprobs: bool = False      # score old log-probs with the training forward instead of the rollout's own
    max_rollout_ratio: float = 0.0        # truncated importance weight training/rollout of recomputed ones; 0: not weighted
    dynamic_sampling: bool = True         # ablation: keep every group
    mask_retrieved: bool = True           # ablation: train on what was retrieved as if the policy had written it
    token_level_loss: bool = True         # ablation: mean over a response's tokens first, then over responses
    max_bad_steps: int = 5                # steps with a non-finite gradient, one after another, before the run gives up
    # numerics and memory
    dtype: str = "float32"                # compute; master weights are always float32
    attn: str = "auto"                    # of the vision tower (the rest has engine/shared_prompt.py): flash_attention_2 where installed, else sdpa
    activation_checkpointing: bool = False
    offload: bool = False                 # weights, gradients and optimizer in CPU memory between uses
    gather_weights: bool = True           # whole weights on every GPU while sampling; otherwise layer by layer, in lockstep
    lora_rank: int = 0                    # train adapters of this rank (peft) instead of the weights
    freeze_vision: bool = False
    # besides metrics.jsonl
    tensorboard: bool = False
    wandb: str = ""                       # project to log to, where wandb is installed
    peak_tflops: float = 0.0              # of one device, for the MFU; 0: known by its name, or no MFU
    # fmt: on


TINY = Config()
# fmt: off
PAPER = dict(
    init="Qwen/Qwen2.5-VL-7B-Instruct",      # [P][D], all weights trained
    kb=Path("data/MMhops-KB"), data=Path("data/MMhops"), out=Path("runs/paper"),
    group_size=8,                            # [P] G
    max_turns=4,                             # [P] T
    temperature=1.0, top_p=0.99,             # [D]
    max_turn_tokens=512,                     # [D]
    max_obs_tokens=1024,                     # [D]
    max_tokens=4096,                         # [D]
    topk=3,                                  # [P] (the authors' training script: 2 [D])
    image_topk=1,                            # [D] the nearest article's title
    instructions=RolloutConfig.instructions,  # [D] in our words
    alpha=1.0, beta=1.0, gamma=0.25,         # [D]; the paper does not say
    overlong_buffer=0,                       # [D] off
    steps=85, max_minutes=0,                 # [D] one epoch: 21,777 questions / 256
    questions_per_step=256,                  # [D] prompts a rollout
    max_refills=10,                          # [D] tries to fill a batch
    updates_per_step=4,                      # [D] of 64 prompts
    lr=1e-6, warmup_steps=0,                # [P][D]
    weight_decay=1e-2, beta2=0.999,          # [D] AdamW
    max_grad_norm=1.0,                       # [D]
    eps_low=0.2, eps_high=0.28,              # [D] clip-higher; no KL penalty [D]
    recompute_logprobs=True,                 # [own] several updates a rollout: the ratio is between two training forwards
    max_rollout_ratio=2.0,                   # [own] Yao et al. 2025
    dtype="bfloat16", activation_checkpointing=True,  # [own]
    micro_tokens=16_384, rollout_rows=128,   # [own] what fits beside the weights in 80 GB: see --plan
    eval_every=10, eval_questions=256, save_every=5)  # [own]
# fmt: on
PRESETS = {
    "tiny": TINY,
    # One GPU of 24 to 80 GB: adapters on a frozen bfloat16 model. Learning rate and batch as usual for LoRA, not the paper's.
    "small": Config(
        **PAPER
        | dict(
            init="Qwen/Qwen2.5-VL-3B-Instruct",
            out=Path("runs/small"),
            lora_rank=64,
            freeze_vision=True,
            lr=1e-5,
            weight_decay=0.0,
            questions_per_step=32,
            steps=400,
            max_refills=3,
            updates_per_step=2,
            micro_tokens=8192,
            rollout_rows=48,
        )
    ),
    "paper": Config(**PAPER),
}


def saved_settings(ckpt: Path | None) -> tuple[RolloutConfig, RewardConfig]:
    """The settings that a checkpoint was trained with: its recipe.json. Without one: the paper's."""
    path = ckpt / "recipe.json" if ckpt else None
    saved = json.loads(path.read_text()) if path and path.exists() else {}

    def settings(kind: type):
        return kind(**{f.name: saved[f.name] for f in fields(kind) if f.name in saved})

    return settings(RolloutConfig), settings(RewardConfig)
