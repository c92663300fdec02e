"""What a run takes, before a GPU is touched: memory by part, tokens and FLOPs a step, hours.

    python train.py paper --plan
    python train.py small --plan --plan-gpus 1 --plan-gpu-gb 24

**Memory** of one GPU, with N parameters over W GPUs of a node: float32 weights, gradients and two moments, 16 N/W bytes
(nothing of it with `--offload`), and the larger of two phases:

- sampling: whole bfloat16 weights, 2 N (or two layers, in lockstep), a KV cache of `rollout_rows` responses at their greatest
  length and of their questions' prompts, the prompts' prefill, the vocabulary scores of one token a row;
- updating: one decoder layer and the root's weights gathered, the root's gradients, a boundary a layer of `micro_tokens`
  tokens (with activation checkpointing), the inside of one layer, and LOGITS vocabulary scores with their gradients.

**Time**: sampling is bound by memory (weights and cache are read for every token), the rest by arithmetic at a stated
utilisation. These are estimates from shapes: no figure here was measured on a GPU.
"""

from pathlib import Path

import torch

from model import LOGITS

VISION = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)
ROPE = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
RELEASED = {  # the config.json of the released models, for planning without a network
    "Qwen/Qwen2.5-VL-3B-Instruct": dict(
        text_config=dict(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            max_position_embeddings=128000,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_parameters=ROPE,
        ),
        vision_config=VISION | dict(out_hidden_size=2048),
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": dict(
        text_config=dict(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=128000,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            rope_parameters=ROPE,
        ),
        vision_config=VISION | dict(out_hidden_size=3584),
        tie_word_embeddings=False,
    ),
}
# dense bfloat16, by the makers' data sheets
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "4090": 165,
    "A6000": 155,
}
PROMPT, IMAGE_TOKENS, QUESTION_TURNS, TURN_TOKENS, OBSERVATION = (
    1300,
    1000,
    4.3,
    100,
    400,
)  # what an episode is taken to be like
GIB = 2**30


def config_of(name: str):
    """The configuration of a folder, a cached or a released model."""
    from transformers import AutoConfig, Qwen2_5_VLConfig

    if name in RELEASED:
        return Qwen2_5_VLConfig(**RELEASED[name])
    return AutoConfig.from_pretrained(name)


def parameter_counts(config) -> dict[str, int]:
    """{part: parameters}: all, layer (one decoder layer), layers, vision, head (the vocabulary projection), root (what is in no unit)."""
    from accelerate import init_empty_weights
    from transformers import Qwen2_5_VLForConditionalGeneration

    with init_empty_weights():
        model = Qwen2_5_VLForConditionalGeneration._from_config(config)
    model.tie_weights()

    def count(module):
        return sum(p.numel() for p in module.parameters())

    layers, blocks = count(model.model.language_model.layers), count(model.model.visual.blocks)
    return {
        "all": count(model),
        "layer": layers // config.text_config.num_hidden_layers,
        "layers": layers,
        "vision": count(model.model.visual),
        "head": model.lm_head.weight.numel(),
        "root": count(model) - layers - blocks,
    }


def forward_flops(
    config, counts: dict, tokens: float, length: float, policy_tokens: float, patches: float
) -> float:
    """Of one forward pass over `tokens` tokens in sequences of about `length`: two a parameter and token, and causal attention."""
    text = config.text_config
    width = text.num_hidden_layers * text.hidden_size
    return (
        2
        * (counts["layers"] * tokens + counts["head"] * policy_tokens + counts["vision"] * patches)
        + 2 * width * tokens * length
    )


def update_flops(cfg, config, counts: dict, responses: list) -> float:
    """What an update of these responses computes: forward, twice that backward, and once more where old log-probs are recomputed."""
    total, seen = 0.0, set()
    for t in responses:
        length, known = (
            len(t.token_ids),
            cfg.share_prompt and id(t.prompt) in seen,
        )  # a prompt, with its pictures, is computed once
        patches = (
            len(t.prompt.pixel_values) if t.prompt.pixel_values is not None and not known else 0
        )
        total += forward_flops(
            config,
            counts,
            length - len(t.prompt.token_ids) * known,
            length,
            int(t.policy_mask.sum()),
            patches,
        )
        seen.add(id(t.prompt))
    return (3 + cfg.recompute_logprobs) * total


def peak_flops(cfg) -> float:
    """Of this machine's device, per second; 0 where it is not known."""
    if cfg.peak_tflops or not torch.cuda.is_available():
        return cfg.peak_tflops * 1e12
    name = torch.cuda.get_device_name()
    return next((peak * 1e12 for key, peak in PEAK_TFLOPS.items() if key in name), 0.0)


def memory(cfg, config, counts: dict, gpus: int, gpus_per_node: int) -> dict[str, float]:
    """Bytes of one GPU by part; "sampling" and "updating" parts do not live at the same time."""
    text, n, shards = config.text_config, counts["all"], min(gpus, gpus_per_node)
    width, size = text.hidden_size, 2 if cfg.dtype == "bfloat16" else 4
    heads = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    kv_token = 2 * text.num_hidden_layers * heads * size
    longest, rows = (
        PROMPT + cfg.max_tokens,
        min(cfg.rollout_rows, cfg.questions_per_step * cfg.group_size // gpus),
    )
    if cfg.lora_rank:  # the frozen model whole, adapters of q, k, v, o, gate, up, down in float32
        inner = text.intermediate_size
        adapters = (
            text.num_hidden_layers
            * cfg.lora_rank
            * ((2 * width) + 2 * (width + heads) + 2 * width + 3 * (width + inner))
        )
        parts = {
            "weights": size * n + 4 * adapters,
            "gradients": 4 * adapters,
            "optimizer": 8 * adapters,
        }
        gathered = unit = root = 0
    else:
        on_gpu = 0 if cfg.offload else 1
        parts = {
            "weights": 4 * n / shards * on_gpu,
            "gradients": 4 * n / shards * on_gpu,
            "optimizer": 8 * n / shards * on_gpu,
        }
        unit = 2 * size * counts["layer"]  # two layers in flight
        root = counts["root"] * (size + size + 4)  # with its gradient, reduced in float32
        gathered = size * n if cfg.gather_weights else unit + size * counts["root"]
    prefill = rows // cfg.group_size * PROMPT * (4 * width + 3 * text.intermediate_size) * size
    inside = (12 * width + 4 * text.intermediate_size) * size
    kept = (
        text.num_hidden_layers * width * size
        if cfg.activation_checkpointing
        else text.num_hidden_layers * inside
    )
    micro = max(cfg.micro_tokens, longest)
    cached = rows // cfg.group_size * PROMPT + rows * cfg.max_tokens
    return parts | {
        "sampling: gathered weights": gathered,
        "sampling: KV cache": cached * kv_token * (1 + 2 / text.num_hidden_layers),
        "sampling: prefill and scores": max(prefill, 4 * 4 * rows * text.vocab_size),
        "updating: gathered layer and root": unit + root,
        "updating: activations": micro * (kept + inside),
        "updating: vocabulary scores": 5 * 4 * LOGITS,
        "context of CUDA and NCCL": 1.5 * GIB,
    }


def peak(parts: dict[str, float]) -> float:
    """The larger phase, and what is always there."""

    def total(phase):
        return sum(
            size for name, size in parts.items() if name.startswith(phase) or ":" not in name
        )

    return max(total("sampling"), total("updating"))


def work(
    cfg, config, counts: dict, gpus: int, tflops: float, mfu: float, bandwidth: float
) -> dict[str, float]:
    """Tokens, FLOPs and seconds of one step of the whole job."""
    rows = cfg.questions_per_step * cfg.group_size
    observed, sampled = (
        (QUESTION_TURNS - 1) * min(OBSERVATION, cfg.max_obs_tokens),
        QUESTION_TURNS * min(TURN_TOKENS, cfg.max_turn_tokens),
    )
    length = PROMPT + sampled + observed
    patches, prompts = 4 * IMAGE_TOKENS, cfg.questions_per_step if cfg.share_prompt else rows
    trained = rows * (sampled + observed) + prompts * PROMPT
    update = (3 + cfg.recompute_logprobs) * forward_flops(
        config, counts, trained, length, rows * sampled, prompts * patches
    )
    prefill = forward_flops(
        config,
        counts,
        cfg.questions_per_step * PROMPT + rows * observed,
        length,
        rows * QUESTION_TURNS,
        cfg.questions_per_step * patches,
    )
    text, speed = config.text_config, gpus * tflops * 1e12 * mfu
    at_once = min(cfg.rollout_rows, rows // gpus)
    cache = (
        at_once
        * length
        * 4
        * text.num_hidden_layers
        * text.num_key_value_heads
        * (text.hidden_size // text.num_attention_heads)
    )
    decode = rows / gpus / at_once * sampled * (2 * counts["all"] + cache) / (bandwidth * 1e12)
    return {
        "responses": rows,
        "tokens a response": length,
        "sampled tokens": rows * sampled,
        "tokens": trained,
        "FLOPs": update + prefill,
        "seconds sampling": decode + prefill / speed,
        "seconds updating": update / speed * (4 / 3 if cfg.activation_checkpointing else 1),
    }


def show(cfg):
    """Print the plan. Raises ValueError when it cannot fit."""
    from rich.console import Console
    from rich.table import Table

    config, gpus = config_of(str(cfg.init)), cfg.plan_gpus
    if cfg.questions_per_step % gpus:
        raise ValueError(
            f"--questions-per-step {cfg.questions_per_step} cannot be shared by {gpus} GPUs"
        )
    counts = parameter_counts(config)
    parts = memory(cfg, config, counts, gpus, min(gpus, 8))
    console, table = Console(width=100), Table()
    table.add_column("memory of one GPU")
    table.add_column("GiB", justify="right")
    for name, size in parts.items():
        table.add_row(name, f"{size / GIB:.1f}")
    table.add_row("peak", f"{peak(parts) / GIB:.1f}", style="bold")
    console.print(
        f"[bold]{cfg.init} on {gpus} × {cfg.plan_gpu_gb:g} GB[/], estimated from shapes, unmeasured"
    )
    console.print(table)
    amounts = work(
        cfg,
        config,
        counts,
        gpus,
        cfg.peak_tflops or PEAK_TFLOPS["H100"],
        cfg.plan_mfu,
        cfg.plan_bandwidth,
    )
    seconds = amounts["seconds sampling"] + amounts["seconds updating"]
    console.print(
        f"{counts['all']:,} parameters. One step: {amounts['responses']:,} responses of about {amounts['tokens a response']:,.0f} "
        f"tokens ({amounts['sampled tokens']:,.0f} sampled; {amounts['tokens']:,.0f} pass through an update, a prompt once a "
        f"question), {amounts['FLOPs']:.2e} FLOPs"
    )
    console.print(
        f"at {cfg.peak_tflops or PEAK_TFLOPS['H100']:g} TFLOP/s and {cfg.plan_mfu:.0%} of it, {cfg.plan_bandwidth:g} TB/s read: "
        f"{amounts['seconds sampling']:,.0f} s sampling + {amounts['seconds updating']:,.0f} s updating; {cfg.steps} steps take "
        f"{seconds * cfg.steps / 3600:.1f} hours, without refills and searches"
    )
    if not Path(str(cfg.init)).exists():
        console.print(
            f"taken to be: prompts of {PROMPT} tokens ({IMAGE_TOKENS} of the image), {QUESTION_TURNS} turns of {TURN_TOKENS} "
            f"tokens, observations of {OBSERVATION}"
        )
    if peak(parts) > 0.97 * cfg.plan_gpu_gb * GIB:
        raise ValueError(
            f"this cannot fit: {peak(parts) / GIB:.1f} of {cfg.plan_gpu_gb:g} GiB. Smaller --rollout-rows or --micro-tokens, "
            f"--no-gather-weights, --offload, --lora-rank or more GPUs would make room"
        )
