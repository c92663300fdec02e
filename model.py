"""The policy: a Qwen2.5-VL of any size, how its sequences are laid out, and the log-probabilities it gives them.

**Loading.** `load_policy` takes any Qwen2.5-VL name or folder. `build_tiny` *writes* a folder of the same format with
about a million parameters, so that there is one loading path for a laptop and for the 7B.

**Positions.** Qwen2.5-VL's rotary embedding takes three coordinates a token (time, height, width). A picture's tokens
are laid out on their grid, text counts all three up together from the largest coordinate before it. The prompt's
coordinates come from Qwen's own `get_rope_index`; what follows the prompt is text, so it just counts on. Leaving them
to be guessed inside `forward` silently gives wrong ones as soon as a cache or padding is involved.

**Log-probabilities.** The policy samples from  softmax(logits / temperature + bias), where bias is -inf for tokens it
must never write: vision tokens (a sampled `<|image_pad|>` would claim a picture that is not there) and the padding rows
of the vocabulary. Scoring uses the same distribution, and projects to the vocabulary only at the tokens that the policy
wrote, a piece at a time: for Qwen's 152,000-entry vocabulary everything else would be wasted memory.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS = (
    2**26
)  # most vocabulary scores alive at once: 256 MB in float32, 441 tokens of Qwen's vocabulary
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
    pixel_values: Tensor | None  # (patches, 3·2·14·14) float32, all images of the question
    image_grid_thw: Tensor | None  # (images, 3) int64, in patches

    @property
    def next_position(self) -> int:
        """The coordinate of the first token after the prompt."""
        return int(self.positions.max()) + 1


def check_name(name: str | Path):
    """Raises FileNotFoundError for what can be neither a model folder nor a Hugging Face name."""
    folder = Path(name)
    if not (folder / "config.json").exists() and (
        folder.exists() or folder.parent.exists() or str(name).count("/") != 1
    ):
        raise FileNotFoundError(
            f"{name} is neither a model folder (it has no config.json) nor a Hugging Face name like org/model"
        )


def load_policy(
    name: str | Path,
    dtype: torch.dtype | str = "auto",
    attn: str = "auto",
    device: str = "cpu",
    shard=None,
    lora_rank: int = 0,
    freeze_vision: bool = False,
):
    """(model, processor) of a Qwen2.5-VL checkpoint, by Hugging Face name or folder; a folder of adapters brings its base.

    dtype "auto" keeps the checkpoint's. attn, of the vision tower, "auto": flash attention where it is installed and computes in
    bfloat16, else SDPA; the language model uses engine/shared_prompt.py. shard: a function that shards an empty model and fills it
    (distributed.py); no rank then ever holds all of it. lora_rank: put fresh adapters, in float32, on every linear layer of the
    language model, and freeze the rest.

    Raises OSError when there is no such checkpoint, and ValueError when it is of another kind. The model's
    `generation_config` is replaced: the released one carries a repetition penalty and a temperature of its own, which
    would make sampled and scored distributions differ.
    """
    from accelerate import init_empty_weights
    from transformers import (
        AutoConfig,
        AutoProcessor,
        GenerationConfig,
        Qwen2_5_VLForConditionalGeneration,
    )
    from transformers.utils import is_flash_attn_2_available, logging

    logging.disable_progress_bar()
    adapters = Path(name) / "adapter_config.json"
    base = (
        json.loads(adapters.read_text())["base_model_name_or_path"] if adapters.exists() else name
    )
    check_name(base)
    try:
        config = AutoConfig.from_pretrained(base)
    except OSError as error:
        raise OSError(
            f"{base} is no folder here and could not be had from Hugging Face: {str(error).splitlines()[0]}"
        ) from None
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"{base} holds a {config.model_type} model; this code trains qwen2_5_vl")
    if attn == "auto":
        attn = (
            "flash_attention_2"
            if is_flash_attn_2_available()
            and str(device).startswith("cuda")
            and dtype != torch.float32
            else "sdpa"
        )
    if shard is None:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            base, dtype=dtype, attn_implementation=attn
        ).to(device)
    else:
        with init_empty_weights():
            model = Qwen2_5_VLForConditionalGeneration._from_config(
                config, dtype=dtype, attn_implementation=attn
            )
        model.tie_weights()
        shard(model, base)
    if adapters.exists():
        model.load_adapter(str(name), is_trainable=lora_rank > 0)
    elif lora_rank:
        from peft import LoraConfig

        model.add_adapter(
            LoraConfig(
                r=lora_rank,
                lora_alpha=2 * lora_rank,
                base_model_name_or_path=str(base),
                target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
            )
        )
    for path, parameter in model.named_parameters():
        if freeze_vision and ".visual." in path:
            parameter.requires_grad_(False)
        if "lora_" in path:
            parameter.data = parameter.data.float()
    processor = AutoProcessor.from_pretrained(name)
    model.generation_config = GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id
    )
    return prepare(model, processor, device), processor


def prepare(model, processor, device="cpu"):
    """Attach what sampling and scoring share: `sampling_bias`, (V,), and `policy_logprobs`."""
    tokenizer = processor.tokenizer
    bias = torch.zeros(model.config.get_text_config().vocab_size)
    bias[len(tokenizer) :] = -torch.inf  # the vocabulary is padded beyond the tokenizer
    bias[
        tokenizer.convert_tokens_to_ids(
            [token for token in VISION_TOKENS if token in tokenizer.get_vocab()]
        )
    ] = -torch.inf
    bias[tokenizer.pad_token_id] = (
        0.0 if tokenizer.pad_token_id == tokenizer.eos_token_id else -torch.inf
    )
    model.sampling_bias = bias.to(device)
    model.config.get_text_config()._attn_implementation = "shared_prompt"
    model.policy_logprobs, model.blank_image = (
        MethodType(policy_logprobs, model),
        MethodType(blank_image, model),
    )
    return model


def policy_logprobs(
    self, at: Tensor, chosen: Tensor, temperature: float, **inputs
) -> tuple[Tensor, Tensor]:
    """Forward pass over one packed sequence that projects to the vocabulary only at the places `at`, (M,), and never more
    than LOGITS numbers at once: what does not fit one piece is computed piece by piece, again in the backward pass.

    chosen: (M,) the tokens that follow there. Returns their log-probabilities and the entropies, (M,) each.
    """
    blank = 0.0 if "pixel_values" in inputs else blank_image(self)  # first, where pictures come
    hidden = self.model(**inputs, use_cache=False).last_hidden_state[0]
    hidden = hidden.index_select(0, at) + blank  # `[at]` would add up its gradients in any order

    def score(hidden, chosen):
        logprobs = sampled_distribution(self.lm_head(hidden), self.sampling_bias, temperature)
        return logprobs.gather(1, chosen[:, None])[:, 0], torch.special.entr(
            logprobs.detach().exp()
        ).sum(-1)

    piece = max(1, LOGITS // len(self.sampling_bias))
    if len(hidden) <= piece:
        return score(hidden, chosen)
    parts = [
        checkpoint(score, h, c, use_reentrant=False)
        for h, c in zip(hidden.split(piece), chosen.split(piece))
    ]
    return tuple(torch.cat(part) for part in zip(*parts))


def blank_image(model) -> Tensor | float:
    """0 through the vision tower. Where weights are sharded every rank must run it, or none: a rank without pictures
    among ranks with some would leave them waiting for ever."""
    if not hasattr(model, "set_reshard_after_forward"):  # not sharded
        return 0.0
    vision, device = model.config.vision_config, model.sampling_bias.device
    patches = torch.zeros(
        vision.spatial_merge_size**2,
        3 * vision.temporal_patch_size * vision.patch_size**2,
        device=device,
    )
    grid = torch.tensor([[1, vision.spatial_merge_size, vision.spatial_merge_size]], device=device)
    return (
        0
        * model.model.visual(
            patches.to(model.model.visual.dtype), grid_thw=grid
        ).pooler_output.sum()
    )


def sampled_distribution(logits: Tensor, bias: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (…, V), at least float32, of the distribution the policy samples from; temperature 0 (greedy) scores at 1."""
    return torch.log_softmax(
        logits.to(torch.promote_types(logits.dtype, torch.float32)) / (temperature or 1.0) + bias,
        dim=-1,
    )


def prompt_positions(model, token_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
    """(3, P) rotary coordinates of a prompt, by Qwen's own rule."""
    if image_grid_thw is None:
        return torch.arange(len(token_ids)).expand(3, -1)
    kinds = (token_ids == model.config.image_token_id).int()[None]
    return model.model.get_rope_index(
        token_ids[None],
        mm_token_type_ids=kinds,
        image_grid_thw=image_grid_thw,
        attention_mask=torch.ones_like(token_ids)[None],
    )[0][:, 0]


def vision_inputs(prompts: list[Prompt], device) -> dict:
    """`pixel_values` and `image_grid_thw` of a batch of prompts, in order; nothing where there are no images."""
    shown = [prompt for prompt in prompts if prompt.pixel_values is not None]
    if not shown:
        return {}
    return {
        "pixel_values": torch.cat([prompt.pixel_values for prompt in shown]).to(device),
        "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in shown]).to(device),
    }


def policy_tokens(responses: list, device="cpu") -> Tensor:
    """(N, L) bool: where the policy wrote, padded with False."""
    return torch.nn.utils.rnn.pad_sequence([t.policy_mask for t in responses], batch_first=True).to(
        device
    )


def pack(responses: list, device, share_prompt: bool = True) -> tuple[dict, Tensor, Tensor]:
    """Whole responses as one sequence without padding: a prompt, its responses one after another, the next prompt …

    Returns (inputs, before, order): what the model is called with; for each token the policy wrote, its place's predecessor in the
    sequence, (M,), in the order of the pack; and where these tokens stand in the (N, L) layout of `policy_tokens`, (M,) flat.
    share_prompt=False repeats the prompt for each response.
    """
    members, width = {}, max(len(t.token_ids) for t in responses)
    for number, t in enumerate(responses):
        members.setdefault(id(t.prompt) if share_prompt else number, []).append(number)
    ids, positions, spans, before, order, prompts, length = [], [], [], [], [], [], 0
    for numbers in members.values():
        prompt = responses[numbers[0]].prompt
        size = len(prompt.token_ids)
        first, responses = length, []
        ids, positions, length = (
            ids + [prompt.token_ids],
            positions + [prompt.positions],
            length + size,
        )
        for number in numbers:
            t = responses[number]
            own, written = t.token_ids[size:], t.policy_mask[size:].nonzero()[:, 0]
            responses.append((length, length + len(own)))
            before.append(torch.where(written == 0, first + size - 1, length + written - 1))
            order.append(number * width + size + written)
            ids.append(own)
            positions.append((prompt.next_position + torch.arange(len(own))).expand(3, -1))
            length += len(own)
        spans.append(((first, first + size), responses))
        prompts.append(prompt)
    inputs = {
        "input_ids": torch.cat(ids)[None].to(device),
        "position_ids": torch.cat(positions, 1)[:, None].to(device),
        "attention_mask": {"full_attention": None},
        "spans": spans,
        **vision_inputs(prompts, device),
    }
    return inputs, torch.cat(before).to(device), torch.cat(order).to(device)


def token_logprobs(
    model, responses: list, temperature: float = 1.0, share_prompt: bool = True
) -> tuple[Tensor, Tensor]:
    """Teacher-forced log-probabilities of what the policy wrote, under the distribution it samples from.

    Returns (logprobs, entropy), both (N, L), at least float32, aligned with `token_ids`, 0 where the policy did not write.
    Every token, retrieved ones included, is attended to; only sampled ones are scored. Gradients flow. Responses that share
    their `prompt` share its computation.
    """
    device, shape = (
        model.sampling_bias.device,
        (len(responses), max(len(t.token_ids) for t in responses)),
    )
    inputs, before, order = pack(responses, device, share_prompt)
    chosen = (
        torch.nn.utils.rnn.pad_sequence([t.token_ids for t in responses], batch_first=True)
        .to(device)
        .flatten()[order]
    )
    scores = model.policy_logprobs(before, chosen, temperature, **inputs)
    return tuple(
        torch.zeros(shape[0] * shape[1], dtype=part.dtype, device=device)
        .index_put((order,), part)
        .view(shape)
        for part in scores
    )
