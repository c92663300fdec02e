"""The cost of a run, before a GPU is touched: memory by part, tokens and FLOPs per step, hours.

    python train.py paper --plan
    python train.py small --plan --plan-gpus 1 --plan-gpu-gb 24

**Memory** of one GPU: what always lives there, and the larger of two phases that do not overlap,

    peak = weights + gradients + optimizer + context + max(sampling, updating).

**Time**: decoding is bound by memory (weights and cache are read for every token) or by launching
kernels, and a turn lasts as long as its longest response; the rest is bound by arithmetic at a
stated utilisation. Estimates from shapes: no figure was measured on a GPU.
"""

import copy
from pathlib import Path

import torch

from engine.samplers import CHUNK_TOKENS
from model import LOGITS
from retrieval import IMAGE_INDEX, TEXT_INDEX

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
# what a response is taken to be like, in tokens
PROMPT = 1300  # the question and its picture
IMAGE_TOKENS = 1000  # of the prompt
PICTURES = 2  # in a micro-batch
TURNS = 4.3  # per response, the answer's included
TURN_TOKENS = 100  # sampled per turn
LONGEST = 2  # the longest turn of a batch, which all wait for, to the mean one
OBSERVATION = 400  # read after each turn but the last
ENCODER_PARAMETERS = 109e6 + 428e6  # e5-base-v2, CLIP ViT-L/14 at 336 pixels
PUBLISHED_VECTORS = 904_790 * 768  # numbers in the passages' index of MMhops-KB
# of a decode step: the CPU launches kernels one after another, and the GPU may have to wait for it
KERNELS_PER_LAYER = 52  # counted by benchmarks/kernels.py
LAUNCH = 10e-6  # seconds per kernel; a guess
FLOAT32 = 4  # bytes per number
BFLOAT16 = 2
GIB = 2**30


def config_of(name: str):
    """The configuration of a folder, a cached or a released model."""
    from transformers import AutoConfig, Qwen2_5_VLConfig

    if name in RELEASED:
        return Qwen2_5_VLConfig(**RELEASED[name])
    return AutoConfig.from_pretrained(name)


def parameter_counts(config) -> dict[str, int]:
    """Parameters by part: "all", "layer" (one decoder layer), "layers" (all of them), "vision",
    "head" (the vocabulary projection), "root" (what is in no decoder layer and no vision block).
    The model is made without memory."""
    from accelerate import init_empty_weights
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"  # transformers does not know ours
    with init_empty_weights():
        model = Qwen2_5_VLForConditionalGeneration._from_config(config)
    model.tie_weights()

    def count(module):
        return sum(p.numel() for p in module.parameters())

    layers = count(model.model.language_model.layers)
    vision_blocks = count(model.model.visual.blocks)
    return {
        "all": count(model),
        "layer": layers // config.text_config.num_hidden_layers,
        "layers": layers,
        "vision": count(model.model.visual),
        "head": model.lm_head.weight.numel(),
        "root": count(model) - layers - vision_blocks,
    }


# -------------------------------------------------------------------------------------------- FLOPs


def forward_flops(
    config, counts: dict, tokens: float, length: float, policy_tokens: float, patches: float
) -> float:
    """Of one forward pass: two per parameter and token, and causal attention.

    tokens: through the decoder, in sequences of about `length`. policy_tokens: those that are
    projected to the vocabulary. patches: through the vision tower.
    """
    text = config.text_config
    linear = counts["layers"] * tokens
    vocabulary = counts["head"] * policy_tokens
    vision = counts["vision"] * patches
    # two products (scores, values) of two FLOPs each; a token sees half of the sequence on average
    attention = text.num_hidden_layers * text.hidden_size * tokens * length
    return 2 * (linear + vocabulary + vision) + 2 * attention


def training_passes(cfg) -> int:
    """What training costs, in forward passes: one, a backward pass that is worth two, and one more
    where old log-probs are recomputed."""
    return 4 if cfg.recompute_logprobs else 3


def update_flops(cfg, config, counts: dict, responses: list) -> float:
    """What training once on these responses computes. A shared prompt, with its pictures, is
    computed once per question."""
    total = 0.0
    computed = set()
    for t in responses:
        tokens = len(t.token_ids)
        patches = 0 if t.prompt.pixel_values is None else len(t.prompt.pixel_values)
        if cfg.share_prompt and id(t.prompt) in computed:
            tokens -= len(t.prompt.token_ids)
            patches = 0
        policy_tokens = int(t.policy_mask.sum())
        total += forward_flops(config, counts, tokens, len(t.token_ids), policy_tokens, patches)
        computed.add(id(t.prompt))
    return training_passes(cfg) * total


def peak_flops(cfg) -> float:
    """Of this machine's device, per second; 0 where it is not known."""
    if cfg.peak_tflops:
        return cfg.peak_tflops * 1e12
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        for name, tflops in PEAK_TFLOPS.items():
            if name in device:
                return tflops * 1e12
    return 0.0


# ------------------------------------------------------------------------------------------- memory


def memory(cfg, config, counts: dict, gpus: int, gpus_per_node: int) -> dict[str, float]:
    """Bytes of one GPU by part; "sampling: …" and "updating: …" live in that phase only."""
    text = config.text_config
    shards = min(gpus, gpus_per_node)
    if cfg.lora_rank:
        always = held_with_adapters(cfg, text, counts)
    else:
        always = held_sharded(cfg, counts, shards)
    at_once = min(cfg.rollout_rows, cfg.questions_per_step * cfg.group_size // gpus)
    return {
        **always,
        **retrieval_memory(cfg),
        **sampling_memory(cfg, text, counts, at_once),
        **updating_memory(cfg, config, counts, shards),
        "beside: context of CUDA and NCCL": 1.5 * GIB,
    }


def phase_bytes(parts: dict[str, float], name: str) -> float:
    """What PyTorch's own tensors take in a phase: held always, or in this phase alone.

    >>> parts = {"weights": 10, "sampling: cache": 5, "updating: scores": 4, "beside: context": 2}
    >>> phase_bytes(parts, "sampling"), peak(parts)
    (15, 17)
    """
    always = sum(size for part, size in parts.items() if ":" not in part)
    return always + sum(size for part, size in parts.items() if part.startswith(f"{name}:"))


def peak(parts: dict[str, float]) -> float:
    """The larger phase, and what lies beside PyTorch's tensors, in bytes."""
    beside = sum(size for part, size in parts.items() if part.startswith("beside:"))
    return beside + max(phase_bytes(parts, name) for name in ("sampling", "updating"))


def held_sharded(cfg, counts: dict, shards: int) -> dict[str, float]:
    """All weights are trained, in shards: float32 weights and Adam's two moments. With `--offload`
    they lie in the CPU's memory."""
    mine = 0 if cfg.offload else counts["all"] / shards
    return {
        "weights": FLOAT32 * mine,
        "optimizer": 2 * FLOAT32 * mine,
    }


def held_with_adapters(cfg, text, counts: dict) -> dict[str, float]:
    """The frozen model, whole; adapters in float32, with their moments and gradients."""
    width, inner, keys = text.hidden_size, text.intermediate_size, key_width(text)
    # an adapter of rank r on an (in → out) projection has r × (in + out) parameters
    attention = (width + width) + 2 * (width + keys) + (width + width)  # q; k and v; o
    feedforward = 3 * (width + inner)  # gate, up, down
    adapters = text.num_hidden_layers * cfg.lora_rank * (attention + feedforward)
    return {
        "weights": number_size(cfg) * counts["all"] + FLOAT32 * adapters,
        "optimizer": 2 * FLOAT32 * adapters,
        "gradients": FLOAT32 * adapters,
    }


def retrieval_memory(cfg) -> dict[str, float]:
    """E5 and CLIP in float32 on every GPU, and the indexes where each GPU holds its own; nothing
    where servers search."""
    if cfg.text_url:
        return {}
    vectors = FLOAT32 * PUBLISHED_VECTORS
    files = [cfg.kb / path for path in (TEXT_INDEX, IMAGE_INDEX)]
    if all(file.exists() for file in files):
        vectors = sum(file.stat().st_size for file in files)
    return {
        "beside: retrieval encoders": FLOAT32 * ENCODER_PARAMETERS,
        "beside: retrieval indexes": vectors if cfg.index_device == "gpu" else 0,
    }


def sampling_memory(cfg, text, counts: dict, at_once: int) -> dict[str, float]:
    """While `at_once` responses are sampled. A prompt is stored once for its G responses."""
    number = number_size(cfg)

    # 1) weights: whole, or layer by layer in lockstep; under adapters they are whole already
    if cfg.lora_rank:
        gathered = 0
    elif cfg.gather_weights:
        gathered = number * counts["all"]
    else:
        gathered = two_layers(cfg, counts) + number * counts["root"]

    # 2) the KV cache at its largest: prompts, and responses at their greatest length
    prompts = at_once // cfg.group_size * PROMPT  # tokens
    cached = prompts + at_once * cfg.max_tokens
    per_layer = 2 * key_width(text) * number  # a token's key and value
    layers = text.num_hidden_layers + 2  # and two layers' worth of copies while it grows

    # 3) reading the prompts or some columns of observations, with a group's keys and values copied
    #    for its query heads; or scoring one token per response; not at the same time
    read = max(prompts, CHUNK_TOKENS)  # tokens
    prefill = read * (8 * text.hidden_size + 3 * text.intermediate_size) * number
    prefill += cfg.group_size * (PROMPT + cfg.max_tokens) * 2 * text.hidden_size * number
    scores = at_once * 4 * FLOAT32 * text.vocab_size  # four arrays of them, float32
    return {
        "sampling: gathered weights": gathered,
        "sampling: KV cache": cached * per_layer * layers,
        "sampling: reading, scores": max(prefill, scores),
    }


def updating_memory(cfg, config, counts: dict, shards: int) -> dict[str, float]:
    """During a forward and backward pass over one micro-batch, packed into one sequence: at the
    moment that needs most. Counted once with `python -m benchmarks.memory`, which says how near
    this comes."""
    text, vision, number = config.text_config, config.vision_config, number_size(cfg)
    tokens = max(cfg.micro_tokens, PROMPT + cfg.max_tokens)  # a longer response stands alone

    # 1) In the backward pass of a layer. Kept per token: the input of every layer with
    #    checkpointing, the inside of every layer without it; and the inside of the one computed.
    inside = (14 * text.hidden_size + 6 * text.intermediate_size) * number
    kept = text.hidden_size * number if cfg.activation_checkpointing else inside
    patches = 4 * IMAGE_TOKENS * PICTURES
    seen = patches * vision.hidden_size * number * (vision.depth + 8)
    activations = tokens * (text.num_hidden_layers * kept + inside) + seen
    # at most LOGITS of them at once (model.py), in five float32 arrays with the gradients
    scores = 5 * FLOAT32 * LOGITS - tokens * inside
    in_a_layer = {"updating: activations": activations + max(0, scores)}
    if cfg.lora_rank:
        return in_a_layer
    # The root's weights and the vocabulary projection's gradient; of a layer weights, gathered and
    # copied, gradients, and their sum over ranks in float32.
    gathered = number * (counts["root"] + counts["head"])
    gathered += counts["layer"] * (3 * number + FLOAT32)
    in_a_layer["updating: gathered layer and root"] = gathered

    # 2) At the end, when the root's gradients are summed over ranks. The shards of all other
    #    gradients are there by then; in the first layer of the first backward pass none was.
    at_the_end = {
        "updating: gradients": 0 if cfg.offload else FLOAT32 * counts["all"] / shards,
        "updating: the root's gradients": counts["root"] * (2 * number + FLOAT32),
    }
    return max(in_a_layer, at_the_end, key=lambda parts: sum(parts.values()))


def number_size(cfg) -> int:
    """Bytes per number of the compute dtype."""
    return BFLOAT16 if cfg.dtype == "bfloat16" else FLOAT32


def key_width(text) -> int:
    """Numbers in one token's key (or value) of one layer."""
    return text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)


def two_layers(cfg, counts: dict) -> int:
    """Bytes of the decoder layer that computes, and of the next, which is gathered meanwhile."""
    return 2 * number_size(cfg) * counts["layer"]


# ------------------------------------------------------------------------------------ work and time


def work(
    cfg, config, counts: dict, gpus: int, tflops: float, mfu: float, bandwidth: float
) -> dict[str, float]:
    """Tokens, FLOPs and seconds of one step of the whole job: its responses sampled, and trained on
    once. tflops and bandwidth (TB/s) are one GPU's; mfu is the part of tflops that is reached.
    """
    text = config.text_config
    speed = gpus * tflops * 1e12 * mfu

    # 1) the responses: what each samples and reads, in tokens
    questions = cfg.questions_per_step
    responses = questions * cfg.group_size
    sampled = TURNS * min(TURN_TOKENS, cfg.max_turn_tokens)
    observed = (TURNS - 1) * min(OBSERVATION, cfg.max_obs_tokens)
    length = PROMPT + sampled + observed
    patches = 4 * IMAGE_TOKENS  # per picture: the vision tower merges 2 × 2 into a token

    # 2) decoding: for a token of each response, the bfloat16 weights are read once, and all caches;
    #    or the CPU is slower than that
    at_once = min(cfg.rollout_rows, responses // gpus)
    rounds = responses / gpus / at_once
    cache = at_once * length * text.num_hidden_layers * 2 * key_width(text) * BFLOAT16
    reading = (BFLOAT16 * counts["all"] + cache) / (bandwidth * 1e12)
    launching = text.num_hidden_layers * KERNELS_PER_LAYER * LAUNCH
    steps = TURNS * min(LONGEST * TURN_TOKENS, cfg.max_turn_tokens)
    decoding = rounds * steps * max(reading, launching)

    # 3) reading: prompts once per question, observations once per response
    read = questions * PROMPT + responses * observed
    reading_flops = forward_flops(
        config, counts, read, length, responses * TURNS, questions * patches
    )

    # 4) updating; computing activations again takes time, but is not counted among the FLOPs
    prompts = questions if cfg.share_prompt else responses
    trained = responses * (sampled + observed) + prompts * PROMPT
    update_flops = training_passes(cfg) * forward_flops(
        config, counts, trained, length, responses * sampled, prompts * patches
    )
    updating = update_flops / speed
    if cfg.activation_checkpointing:
        updating *= 4 / 3

    return {
        "responses": responses,
        "tokens per response": length,
        "sampled tokens": responses * sampled,
        "tokens": trained,
        "FLOPs": update_flops + reading_flops,
        "seconds sampling": decoding + reading_flops / speed,
        "seconds updating": updating,
    }


# ----------------------------------------------------------------------------------------- the plan


def show(cfg):
    """Print the plan. Raises ValueError when GPUs cannot share the questions, or it cannot fit."""
    from rich.console import Console

    gpus = cfg.plan_gpus
    if cfg.questions_per_step % gpus:
        raise ValueError(
            f"--questions-per-step {cfg.questions_per_step} cannot be shared by {gpus} GPUs"
        )
    config = config_of(str(cfg.init))
    counts = parameter_counts(config)
    parts = memory(cfg, config, counts, gpus, gpus_per_node=min(gpus, 8))
    tflops = cfg.peak_tflops or PEAK_TFLOPS["H100"]
    amounts = work(cfg, config, counts, gpus, tflops, cfg.plan_mfu, cfg.plan_bandwidth)

    console = Console(width=100)
    console.print(
        f"[bold]{cfg.init} on {gpus} × {cfg.plan_gpu_gb:g} GB[/], estimated from shapes, unmeasured"
    )
    console.print(memory_table(parts))
    console.print(amounts_text(counts, amounts))
    console.print(hours_text(cfg, tflops, amounts))
    if not Path(str(cfg.init)).exists():
        console.print(
            f"taken to be: prompts of {PROMPT} tokens ({IMAGE_TOKENS} of the image), {TURNS} turns "
            f"of {TURN_TOKENS} tokens, observations of {OBSERVATION}"
        )
    if peak(parts) > 0.97 * cfg.plan_gpu_gb * GIB:
        raise ValueError(
            f"this cannot fit: {peak(parts) / GIB:.1f} of {cfg.plan_gpu_gb:g} GiB. "
            "Smaller --rollout-rows or --micro-tokens, --no-gather-weights, --offload, --lora-rank "
            "or more GPUs would make room"
        )


def memory_table(parts: dict[str, float]):
    """Memory by part and its peak, in GiB, as a table for the terminal."""
    from rich.table import Table

    table = Table()
    table.add_column("memory of one GPU")
    table.add_column("GiB", justify="right")
    for name, size in parts.items():
        table.add_row(name, f"{size / GIB:.1f}")
    table.add_row("peak", f"{peak(parts) / GIB:.1f}", style="bold")
    return table


def amounts_text(counts: dict, amounts: dict) -> str:
    return (
        f"{counts['all']:,} parameters. One step: {amounts['responses']:,} responses of about "
        f"{amounts['tokens per response']:,.0f} tokens ({amounts['sampled tokens']:,.0f} sampled; "
        f"{amounts['tokens']:,.0f} pass through an update, a prompt once per question), "
        f"{amounts['FLOPs']:.2e} FLOPs"
    )


def hours_text(cfg, tflops: float, amounts: dict) -> str:
    sampling, updating = amounts["seconds sampling"], amounts["seconds updating"]
    hours = cfg.steps * (sampling + updating) / 3600
    return (
        f"at {tflops:g} TFLOP/s and {cfg.plan_mfu:.0%} of it, {cfg.plan_bandwidth:g} TB/s read: "
        f"{sampling:,.0f} s sampling + {updating:,.0f} s updating; {cfg.steps} steps take "
        f"{hours:.1f} hours, without refills and searches"
    )
