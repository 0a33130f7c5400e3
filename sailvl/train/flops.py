"""How many floating-point operations a training step is, in closed form from shapes alone.

A linear layer of N weights on T rows costs 2NT forward, as much again for the gradient of its input (if anything before
it trains, norms and embeddings included) and once more for that of its weights (if it trains). Attention costs, per
layer and document, 4 x width x length^2 forward, half of that when causal, and three times that with gradients. The
embedding, norms, activations and softmax are left out, as everywhere: below a hundredth.

Counts are exact integers and equal what torch's ``FlopCounterMode`` counts (with square attention, which the counter
cannot see through). Recomputation by activation checkpointing is not work done and not counted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sailvl.model.configuration import SailVLConfig
from sailvl.types import Batch


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one pack: tokens of each document, tiles, and supervised rows."""

    lengths: tuple[int, ...]
    num_tiles: int
    num_supervised: int


def shape_of(batch: Batch) -> Shape:
    """The shape of a batch."""
    return Shape(
        lengths=tuple((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()),
        num_tiles=len(batch.tiles_N3SS),
        num_supervised=len(batch.rows_R),
    )


def step_flops(
    config: SailVLConfig, shapes: Sequence[Shape], trains: Collection[str], *, square_attention: bool = False
) -> int:
    """Floating-point operations of forward and backward over ``shapes``, training the parts ``trains``.

    ``square_attention`` counts causal attention as if every token attended to every other, as kernels without a causal
    shortcut compute it.
    """
    return sum(
        _vit(config, shape, "vit" in trains)
        + _projector(config, shape, trains)
        + _lm(config, shape, "lm" in trains, 4 if square_attention else 2)
        for shape in shapes
    )


def _vit(config: SailVLConfig, shape: Shape, trains: bool) -> int:
    vision = config.vision_config
    width, patches, select = vision.hidden_size, vision.num_patches, config.select_layer
    layers = select if select >= 0 else vision.num_hidden_layers + 1 + select
    rows = patches * shape.num_tiles
    stem = 2 * rows * vision.num_channels * vision.patch_size**2 * width
    blocks = 2 * rows * layers * (4 * width * width + 3 * width * vision.intermediate_size)
    attention = 4 * layers * width * patches**2 * shape.num_tiles
    # Pixels need no gradient, so the stem trains at twice its forward cost and all else at three times.
    total: int = stem * (2 if trains else 1) + (blocks + attention) * (3 if trains else 1)
    return total


def _projector(config: SailVLConfig, shape: Shape, trains: Collection[str]) -> int:
    merged, width = config.vision_config.hidden_size * config.merge**2, config.text_config.hidden_size
    forward = 2 * shape.num_tiles * config.tokens_per_tile * (merged * width + width * width)
    total: int = forward * (1 + ("vit" in trains or "projector" in trains) + ("projector" in trains))
    return total


def _lm(config: SailVLConfig, shape: Shape, trains: bool, attention_factor: int) -> int:
    text = config.text_config
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    layer = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    linear = 2 * text.num_hidden_layers * layer * sum(shape.lengths)
    head = 2 * text.hidden_size * text.vocab_size * shape.num_supervised
    attention = attention_factor * text.num_hidden_layers * queries * sum(length**2 for length in shape.lengths)
    # Whatever trains lies at or before the language model, so gradients always pass through all of it.
    total: int = (linear + head) * (3 if trains else 2) + 3 * attention
    return total
