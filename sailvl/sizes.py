"""The shapes of the models by name, as plain data: planning reads them without loading torch.

SAIL-ViT-Huge with Qwen3-0.6B, 1.7B, 8B and 30B-A3B (technical report arXiv 2509.14033, section 2), with a sparse model
of 16 B parameters, and ``nano`` and ``nano-moe``, the same graphs for a CPU; ``2b-anyres`` and ``nano-anyres`` see
pictures as they are instead of tiles.
"""

from __future__ import annotations

from typing import Any

_HUGE = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 12}
_QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
_QWEN3_MOE = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,  # of dense layers, of which there are none
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
_NANO_VIT = {
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.06,
}
_NANO_LM = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "initializer_range": 0.05,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}

SIZES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "nano": (112, _NANO_VIT, _NANO_LM),
    "nano-moe": (
        112,
        _NANO_VIT,
        {
            **_NANO_LM,
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 256,  # two experts are as wide as the dense model's block
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "1b": (
        448,
        _HUGE,
        {
            **_QWEN3,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
    ),
    "2b": (
        448,
        _HUGE,
        {
            **_QWEN3,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
    ),
    "8b": (
        448,
        _HUGE,
        {
            **_QWEN3,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
    ),
    # The report names a backbone of 16 B parameters, 2.5 B of them active, and publishes no field of it: these are
    # ours, which give 15.7 B and 2.4 B.
    "16b-a2.5b": (448, _HUGE, {**_QWEN3_MOE, "num_hidden_layers": 32, "num_experts": 96}),
    "30b-a3b": (448, _HUGE, {**_QWEN3_MOE, "num_hidden_layers": 48, "num_experts": 128}),
}
SIZES |= {
    f"{size}-anyres": (SIZES[size][0], {**SIZES[size][1], "any_resolution": True}, SIZES[size][2])
    for size in ("nano", "2b")
}
"""Size name to tile side in pixels, encoder fields, language model fields.

The nano model starts with larger weights than the usual 0.02, nearer to 1 / sqrt(width): products of features (an
object, and where it is) would otherwise take most of its minutes of training to leave zero.
"""
