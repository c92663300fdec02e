"""The loading path, and the released 7B's shape."""

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from model import load_policy
from tiny.model import build_tiny


def test_the_7b_configuration_has_the_released_models_parameters():
    """config.json of Qwen/Qwen2.5-VL-7B-Instruct: 729 tensors, 8,292,166,656 parameters."""
    config = Qwen2_5_VLConfig(
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
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
        ),
        vision_config=dict(
            depth=32,
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            out_hidden_size=3584,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=112,
            fullatt_block_indexes=[7, 15, 23, 31],
        ),
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    parameters = dict(model.named_parameters())
    assert len(parameters) == 729
    assert sum(p.numel() for p in parameters.values()) == 8_292_166_656
    for name, shape in {
        "lm_head.weight": (152064, 3584),
        "model.language_model.embed_tokens.weight": (152064, 3584),
        "model.language_model.layers.27.self_attn.k_proj.bias": (512,),
        "model.visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        "model.visual.blocks.31.mlp.down_proj.weight": (1280, 3420),
        "model.visual.merger.mlp.2.weight": (3584, 5120),
    }.items():
        assert parameters[name].shape == shape


def test_a_tiny_folder_loads_unaided(tmp_path):
    build_tiny(tmp_path, ["a small corpus of words"] * 10, vocab_size=512)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    ids = processor.tokenizer("<think> a</think>")["input_ids"]
    assert processor.tokenizer.decode(ids) == "<think> a</think>"


def test_a_policy_is_a_model_its_processor_and_a_bias(tmp_path):
    build_tiny(tmp_path, ["a small corpus of words"] * 10, vocab_size=512)
    policy = load_policy(tmp_path)
    assert policy.tokenizer is policy.processor.tokenizer
    assert policy.device == policy.bias.device == torch.device("cpu")
    assert len(policy.bias) == policy.model.lm_head.out_features
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    assert vars(policy.model).keys() == vars(plain).keys(), "nothing is hung on the model"
    # the released sampling settings would make what is sampled and what is scored differ
    settings = policy.model.generation_config
    assert settings.repetition_penalty in (None, 1.0)
    assert settings.temperature in (None, 1.0)
    assert settings.eos_token_id == policy.tokenizer.eos_token_id


def test_another_kind_of_model_is_refused(tmp_path):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bert"):
        load_policy(tmp_path)
