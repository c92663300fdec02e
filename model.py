"""The policy: a Qwen2.5-VL of any size, and the log-probabilities it gives to what it wrote.

Tokens are scored under

    π(token | before) = softmax(logits / temperature + bias)

and sampled from it, from its nucleus where top_p < 1. The bias is -inf for tokens it must never
write: vision tokens (a sampled `<|image_pad|>` would claim a picture that is not there), padding,
and the rows of the vocabulary beyond the tokenizer's.

Qwen2.5-VL's rotary embedding takes three coordinates per token (time, height, width). A picture's
tokens are laid out on their grid; text counts all three up together from the largest coordinate
before it. The prompt's come from Qwen's own `get_rope_index`; what follows the prompt is text and
just counts on. Leaving them to be guessed inside `forward` silently gives wrong ones as soon as a
cache or padding is involved.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine import shared_prompt, vision_attention, weights
from engine.distributed import call_sharded, is_sharded
from engine.packing import pack, unpack

LOGITS = 2**26  # most logits alive at once: 256 MiB in float32, 441 tokens of Qwen's vocabulary
VISION_TOKENS = [
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


@dataclass
class Prompt:
    """A question as the policy sees it, made once and shared by its G responses."""

    token_ids: Tensor  # (P,) int64
    positions: Tensor  # (3, P) int64
    pixel_values: Tensor | None  # (patches, 3·2·14·14) float32, all pictures of the question
    image_grid_thw: Tensor | None  # (pictures, 3) int64, in patches

    @property
    def next_position(self) -> int:
        """The coordinate of the first token after the prompt."""
        return int(self.positions.max()) + 1


@dataclass
class Policy:
    """What is passed around: the model, its processor, and the bias on what it may write."""

    model: torch.nn.Module  # Qwen2_5_VLForConditionalGeneration, whole or sharded
    processor: object
    bias: Tensor  # (V,) float32, 0 or -inf, on the model's device

    @property
    def device(self) -> torch.device:
        return self.bias.device

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    def logprobs(
        self, responses: list, temperature: float = 1.0, share_prompt: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced log-probabilities of what the policy wrote, and the entropies there.

        Both are (N, L), at least float32, aligned with the padded `token_ids`, 0 where the policy
        did not write. Gradients flow. Responses that share their `prompt` share its computation.
        """
        packed = pack(responses, self.device, share_prompt)
        logprobs, entropies = call_sharded(
            self.model,
            score_tokens,
            packed.predictors,
            packed.chosen,
            self.bias,
            temperature,
            **packed.inputs,
        )
        return unpack(logprobs, packed, responses), unpack(entropies, packed, responses)


# --------------------------------------------------------------------------------------- loading


def load_policy(
    name: str | Path,
    dtype: torch.dtype | str = "auto",
    attn: str = "auto",
    device: str = "cpu",
    shard=None,
    lora_rank: int = 0,
    freeze_vision: bool = False,
) -> Policy:
    """A Qwen2.5-VL checkpoint, by Hugging Face name or folder; adapters bring their base.

    dtype: "auto" is, on a GPU, what it was trained in; on a CPU, the checkpoint's. attn: of the
    vision tower, engine/vision_attention.py says what "auto" is (the language model has
    engine/shared_prompt.py). shard: a function (model, name) that shards an empty model and fills
    it (engine/distributed.py): no rank then ever holds all of it. lora_rank: put fresh float32
    adapters on every linear layer of the language model, and freeze the rest.

    Raises OSError when there is no such checkpoint, ValueError when it is of another kind.
    """
    from transformers import AutoProcessor, GenerationConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    # 1) the weights
    base = weights.base_of(name)  # adapters name theirs
    config = weights.load_config(name)
    dtype = weights.computes_in(name, config, device) if dtype == "auto" else dtype
    attention = vision_attention.choose(attn, dtype, device)
    # transformers refuses to load with our own attention: that one is set in 3)
    loadable = "sdpa" if attention == vision_attention.NAME else attention
    options = {"dtype": dtype, "attn_implementation": loadable}
    if shard is None:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, **options).to(device)
    else:
        model = weights.empty_model(config, **options)
        shard(model, base)
    # 2) what of them is trained
    if base != name:
        weights.load_adapters(model, name, is_trainable=lora_rank > 0)
    elif lora_rank:
        weights.add_adapters(model, lora_rank, base)
    for path, parameter in model.named_parameters():
        if freeze_vision and ".visual." in path:
            parameter.requires_grad_(False)
        if "lora_" in path:
            parameter.data = parameter.data.float()
    # 3) how it is run
    processor = AutoProcessor.from_pretrained(name)
    tokenizer = processor.tokenizer
    # The released generation_config carries a repetition penalty and a temperature of its own,
    # which would make sampled and scored distributions differ.
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.config.vision_config._attn_implementation = attention
    return make_policy(model, processor, device)


def make_policy(model, processor, device="cpu") -> Policy:
    """The policy of a loaded model. Its language model attends by engine/shared_prompt.py."""
    text_config = model.config.get_text_config()
    text_config._attn_implementation = shared_prompt.NAME
    bias = sampling_bias(processor.tokenizer, text_config.vocab_size)
    return Policy(model, processor, bias.to(device))


def sampling_bias(tokenizer, vocab_size: int) -> Tensor:
    """(vocab_size,) float32: -inf for what the policy must never write, else 0."""
    known = tokenizer.get_vocab()
    forbidden = [token for token in VISION_TOKENS if token in known]
    bias = torch.zeros(vocab_size)
    bias[len(tokenizer) :] = -torch.inf  # the vocabulary is padded beyond the tokenizer
    bias[tokenizer.convert_tokens_to_ids(forbidden)] = -torch.inf
    # Qwen's pad token is not its end-of-turn token; another tokenizer's may be
    pad_ends_turns = tokenizer.pad_token_id == tokenizer.eos_token_id
    bias[tokenizer.pad_token_id] = 0.0 if pad_ends_turns else -torch.inf
    return bias


# --------------------------------------------------------------------------------------- scoring


def sampled_distribution(logits: Tensor, bias: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (…, V), at least float32. Temperature 0 (greedy) scores at 1."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits / (temperature or 1.0) + bias, dim=-1)


def score_tokens(
    model, predictors: Tensor, chosen: Tensor, bias: Tensor, temperature: float, **inputs
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M,) of the tokens `chosen` (M,) of a packed sequence, and entropies (M,).

    predictors: (M,) the places in the sequence whose scores predict them.

    The vocabulary projection is computed at these places only, and for at most LOGITS numbers at a
    time: what does not fit one piece is computed piece by piece, again in the backward pass. For
    Qwen's vocabulary of 152,000 everything else would be wasted memory.
    """
    zero = 0.0 if "pixel_values" in inputs else blank_image(model, predictors.device)
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[0]  # (length, D)
    # not hidden[predictors]: its backward pass sums gradients in no fixed order
    hidden = hidden.index_select(0, predictors) + zero

    def score(hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = sampled_distribution(model.lm_head(hidden), bias, temperature)
        entropies = torch.special.entr(logprobs.detach().exp()).sum(-1)
        return logprobs.gather(1, chosen[:, None])[:, 0], entropies

    piece = max(1, LOGITS // len(bias))
    if len(hidden) <= piece:
        return score(hidden, chosen)
    pieces = zip(hidden.split(piece), chosen.split(piece))
    scored = [checkpoint(score, h, c, use_reentrant=False) for h, c in pieces]
    logprobs, entropies = zip(*scored)
    return torch.cat(logprobs), torch.cat(entropies)


def blank_image(model, device) -> Tensor | float:
    """A zero whose graph runs through the vision tower.

    Where weights are sharded every rank must run it, or none: a rank without pictures among ranks
    with some would leave them waiting for ever.
    """
    if not is_sharded(model):
        return 0.0
    vision, tower = model.config.vision_config, model.model.visual
    side = vision.spatial_merge_size  # in patches: the smallest picture
    patch_numbers = 3 * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.zeros(side**2, patch_numbers, device=device).to(tower.dtype)
    grid = torch.tensor([[1, side, side]], device=device)
    return 0 * tower(patches, grid_thw=grid).pooler_output.sum()


def prompt_positions(model, token_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
    """(3, P) rotary coordinates of a prompt (P,), by Qwen's own rule."""
    if image_grid_thw is None:
        return torch.arange(len(token_ids)).expand(3, -1)
    kinds = (token_ids == model.config.image_token_id).int()[None]
    positions, _ = model.model.get_rope_index(
        token_ids[None],
        mm_token_type_ids=kinds,
        image_grid_thw=image_grid_thw.to(token_ids.device),
        attention_mask=torch.ones_like(token_ids)[None],
    )
    return positions[:, 0]
