"""The tiny policy: a Qwen2.5-VL folder with about 1.5 million parameters, written from nothing.

A laptop loads it exactly as eight GPUs load the 7B (`model.load_policy`).
"""

import json
import re
from pathlib import Path

import torch

from rollout import ACTIONS

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TAGS = [f"<{slash}{tag}>" for tag in ("think", *ACTIONS, "information") for slash in ("", "/")]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PICTURE = 56  # pixels a side: with patches of 14, merged 2×2, that is four tokens


def train_tokenizer(corpus, vocab_size: int):
    """A byte-level BPE tokenizer over a corpus of texts; every tag is one token.

    Its words are cut as Qwen's are, numbers into digits: transformers' Qwen2Tokenizer cuts so
    whatever the file says that it loads.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(TAGS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    pieces = (piece for text in corpus for piece in re.split("|".join(TAGS), text))
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


def tiny_config(tokenizer, hidden: int, layers: int, heads: int, kv_heads: int, mlp: int):
    """The Qwen2_5_VLConfig of a small policy over a tokenizer. Embeddings are tied."""
    from transformers import Qwen2_5_VLConfig

    token = tokenizer.token_to_id
    vocab_size = -(-tokenizer.get_vocab_size() // 64) * 64  # rounded up
    # How mRoPE shares a head's rotated pairs among time, height and width: 2:3:3, as in the 7B.
    pairs = hidden // heads // 2
    height = width = pairs * 3 // 8
    sections = [pairs - height - width, height, width]
    text = dict(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=sections),
        initializer_range=0.05,
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
    )
    vision = dict(
        depth=1,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=112,
        out_hidden_size=hidden,
        fullatt_block_indexes=[0],
        initializer_range=0.05,
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def write_processor(folder: Path):
    """The files beside tokenizer.json from which transformers makes tokenizer and processor."""
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 4096,
            "padding_side": "left",
            "extra_special_tokens": SPECIAL_TOKENS[1:],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "min_pixels": PICTURE * PICTURE,
            "max_pixels": PICTURE * PICTURE,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],  # CLIP's, as the 7B's
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=1))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def build_tiny(
    folder: Path | str,
    corpus,
    vocab_size: int = 4096,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    mlp: int = 384,
    seed: int = 0,
):
    """Write a tiny, untrained Qwen2.5-VL folder: config, safetensors weights, tokenizer, processor.

    corpus: texts for the tokenizer. mlp: the feed-forward width. Returns the model, in float32.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus, vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(
        tiny_config(tokenizer, hidden, layers, heads, kv_heads, mlp)
    )
    model.save_pretrained(folder)
    write_processor(folder)
    return model
