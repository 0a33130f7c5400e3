"""The tiny model of most tests: its shape, and weights with which it has something to say."""

from __future__ import annotations

import copy

import torch

from sailvl.model import SailVLForConditionalGeneration

VIT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
LM = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}


def loud(model: SailVLForConditionalGeneration) -> SailVLForConditionalGeneration:
    """A copy with weights large enough that answers differ, and with no end token in the way."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(0.0, 0.2, generator=generator)
            elif "norm" not in name:
                value.normal_(0.0, 0.1, generator=generator)
    model.generation_config.suppress_tokens += [model.generation_config.eos_token_id]
    return model
