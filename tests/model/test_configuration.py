"""Released configurations read as they are, sizes, and the published parameter counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, Qwen3Config

from sailvl.model import SailVLConfig, SailVLForConditionalGeneration, SailVLModel, checkpoint

RELEASE_2B: dict[str, Any] = {
    "architectures": ["SAILVLModel"],
    "auto_map": {"AutoConfig": "configuration_sailvl.SAILVLConfig"},
    "downsample_ratio": 0.5,
    "llm_config": {
        "architectures": ["Qwen3ForCausalLM"],
        "attn_implementation": "eager",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
    },
    "max_dynamic_patch": 12,
    "model_type": "sailvl",
    "ps_version": "v2",
    "select_layer": -1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1536,
        "image_size": 448,
        "intermediate_size": 4096,
        "model_type": "sailvit",
        "num_attention_heads": 12,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
}


def read(tmp_path: Path, values: dict[str, Any]) -> SailVLConfig:
    (tmp_path / "config.json").write_text(json.dumps(values))
    return AutoConfig.from_pretrained(tmp_path)


def counts(config: SailVLConfig) -> tuple[int, int, int]:
    with torch.device("meta"):
        model = SailVLForConditionalGeneration(config)
    model.tie_weights()
    return tuple(sum(p.numel() for _, p in checkpoint.part_parameters(model, part)) for part in checkpoint.PARTS)


def test_the_released_2b(tmp_path: Path) -> None:
    config = read(tmp_path, RELEASE_2B)
    assert isinstance(config.text_config, Qwen3Config)
    assert config.text_config.rope_parameters["rope_theta"] == 1_000_000
    assert config.architectures == ["SailVLForConditionalGeneration"]
    assert (config.image_token_id, config.tokens_per_tile, config.select_layer) == (151671, 256, -1)
    assert config.tie_word_embeddings is True, "the language model decides, not the repeated key"
    parts = counts(config)
    assert parts == (682_031_616, 16_793_600, 1_720_574_976)
    # The released index: two bytes each, and a stored copy of the tied head.
    assert 2 * (sum(parts) + 151_936 * 2048) == 5_461_130_240


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("1b", (682_031_616, 7_354_368, 596_049_920)),
        ("2b", (682_031_616, 16_793_600, 1_720_574_976)),
        ("8b", (682_031_616, 41_963_520, 8_190_735_360)),
    ],
)
def test_sizes(size: str, expected: tuple[int, int, int]) -> None:
    assert counts(checkpoint.config_for(size)) == expected


def test_auto_classes_from_a_configuration() -> None:
    """Servers build the model without its head from a configuration, on the meta device."""
    config = checkpoint.config_for("2b")
    with torch.device("meta"):
        base = AutoModel.from_config(config)
        generating = AutoModelForImageTextToText.from_config(config)
    assert type(base) is SailVLModel and type(generating) is SailVLForConditionalGeneration
    assert base.get_decoder() is base.language_model and base.get_encoder(modality="image") is base.vision_tower
    assert {value.device.type for value in base.parameters()} == {"meta"}


def test_missing_keys_mean_the_published_class_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, {"model_type": "sailvl", "llm_config": {"model_type": "qwen3"}, "vision_config": {}})
    assert (config.select_layer, config.ps_version, config.max_dynamic_patch) == (-4, "v1", 6)
    vit = config.vision_config
    assert (vit.hidden_size, vit.num_attention_heads, vit.intermediate_size, vit.image_size) == (1024, 8, 2816, 224)
    with torch.device("meta"), pytest.raises(ValueError, match="ps_version is 'v1'"):
        SailVLForConditionalGeneration(config)


@pytest.mark.parametrize("changes", [{}, {"select_layer": -4}, {"select_layer": 2, "image_token_id": 7}])
def test_saving_and_reading_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = read(tmp_path, {**RELEASE_2B, **changes})
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    ours, theirs = config.to_dict(), again.to_dict()
    assert {k: v for k, v in ours.items() if k != "_name_or_path"} == {
        k: v for k, v in theirs.items() if k != "_name_or_path"
    }
    assert "auto_map" not in theirs


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"llm_config": {"model_type": "llama"}}, "llm_config.model_type is 'llama'"),
        ({"vision_config": {"model_type": "intern_vit_6b"}}, "vision_config.model_type is 'intern_vit_6b'"),
        ({"vision_config": {"qkv_bias": True}}, "SAIL-ViT has none"),
    ],
)
def test_other_families_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SailVLConfig(**{**{key: RELEASE_2B[key] for key in ("llm_config", "vision_config")}, **wrong})


def test_config_for_takes_overrides() -> None:
    config = checkpoint.config_for(
        "nano", side=224, vit={"num_hidden_layers": 2}, lm={"hidden_size": 128}, vocab_size=900
    )
    assert (config.vision_config.image_size, config.vision_config.num_hidden_layers) == (224, 2)
    assert (config.text_config.hidden_size, config.text_config.vocab_size, config.image_token_id) == (128, 900, 893)
    with pytest.raises(ValueError, match="unknown model size '3b'; sizes: nano, "):
        checkpoint.config_for("3b")


def test_the_packaged_tokenizer_has_the_ids_nano_expects() -> None:
    from tokenizers import Tokenizer

    from sailvl.assets import tokenizer_path

    tokenizer, config = Tokenizer.from_file(str(tokenizer_path())), checkpoint.config_for("nano")
    assert tokenizer.get_vocab_size() == config.text_config.vocab_size
    ids = [
        tokenizer.token_to_id(token) for token in ("<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>", "<|endoftext|>")
    ]
    text = config.text_config
    expected = [config.image_start_token_id, config.image_end_token_id, config.image_token_id]
    assert ids == [*expected, text.eos_token_id, text.pad_token_id]
