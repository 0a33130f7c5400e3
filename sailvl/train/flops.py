"""How many floating-point operations a training step is, in closed form from shapes alone.

A linear layer of N weights on T rows costs 2NT forward, as much again for the gradient of its input (if anything before
it trains, norms and embeddings included) and once more for that of its weights (if it trains). Of a sparse layer the
router and the chosen experts are work. Attention costs, per layer and document, 4 x width x length^2 forward, half of
that when causal, and three times that with gradients. The embedding, norms, activations and softmax are left out, as
everywhere: below a hundredth.

With adapters of rank r (``lora_rank``) the weights beside them cost no third pass. Each adapter is two more linear
layers of r x (in + out) weights that train, and where nothing before a linear layer trains, neither it nor its adapter
computes a gradient of their input: the first layer's query, key and value (in the encoder, its ``qkv``), and the
projector's first.

Counts are exact integers and equal what torch's ``FlopCounterMode`` counts (with square attention, which the counter
cannot see through). Recomputation by activation checkpointing is not work done and not counted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sailvl.model.configuration import SailVLConfig
    from sailvl.types import Batch


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one pack: tokens of each document, tiles, and supervised rows.

    At any resolution ``grids`` are the (rows, columns) in patches of each picture, and ``num_tiles`` does not count.
    """

    lengths: tuple[int, ...]
    num_tiles: int
    num_supervised: int
    grids: tuple[tuple[int, int], ...] | None = None

    def patches(self, config: SailVLConfig) -> list[int]:
        """Patches of everything that the vision encoder attends within: tiles, or pictures."""
        if self.grids is None:
            return [config.vision_config.num_patches] * self.num_tiles
        return [rows * columns for rows, columns in self.grids]

    def times(self, count: int) -> Shape:
        """The shape of so many such packs joined."""
        return Shape(
            lengths=self.lengths * count,
            num_tiles=self.num_tiles * count,
            num_supervised=self.num_supervised * count,
            grids=None if self.grids is None else self.grids * count,
        )


def shape_of(batch: Batch) -> Shape:
    """The shape of a batch."""
    return Shape(
        lengths=tuple((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()),
        num_tiles=batch.num_tiles,
        num_supervised=len(batch.rows_R),
        grids=None if batch.grids_N2 is None else tuple((rows, columns) for rows, columns in batch.grids_N2.tolist()),
    )


def step_flops(
    config: SailVLConfig,
    shapes: Sequence[Shape],
    trains: Collection[str],
    *,
    lora_rank: int | None = None,
    square_attention: bool = False,
) -> int:
    """Floating-point operations of forward and backward over ``shapes``, training the parts ``trains``.

    With ``lora_rank`` they train through adapters alone. ``square_attention`` counts causal attention as if every token
    attended to every other, as kernels without a causal shortcut compute it.
    """
    return sum(
        _vit(config, shape, "vit" in trains, lora_rank)
        + _projector(config, shape, trains, lora_rank)
        + _lm(config, shape, trains, lora_rank, 4 if square_attention else 2)
        for shape in shapes
    )


def mfu(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilization: the fraction of the devices' ``peak`` (FLOP/s of each) that ``flops`` of work in
    ``seconds`` are. None where the peak is unknown."""
    return flops / (seconds * devices * peak) if peak and seconds > 0 else None


def _adapters(rows: int, rank: int, sides: int, first: int) -> int:
    """Forward and backward of adapters whose layers' inputs and outputs add up to ``sides``.

    ``first`` adds up the inputs that need no gradient.
    """
    return 2 * rows * rank * (3 * sides - first)


def vit_layers(config: Any) -> int:
    """How many of the encoder's blocks are run: those behind the selected hidden state are not."""
    select: int = config.select_layer
    layers: int = config.vision_config.num_hidden_layers
    return select if select >= 0 else layers + 1 + select


def _vit(config: SailVLConfig, shape: Shape, trains: bool, rank: int | None) -> int:
    vision = config.vision_config
    width, patches, layers = vision.hidden_size, shape.patches(config), vit_layers(config)
    rows = sum(patches)
    stem = 2 * rows * vision.num_channels * vision.patch_size**2 * width
    blocks = 2 * rows * layers * (4 * width * width + 3 * width * vision.intermediate_size)
    attention = 4 * layers * width * sum(count**2 for count in patches)
    if trains and rank is not None:
        extra = _adapters(rows, rank, layers * (9 * width + 3 * vision.intermediate_size), width)
        return int(stem + 2 * blocks + 3 * attention - 2 * rows * width * 3 * width + extra)
    # Pixels need no gradient, so the stem trains at twice its forward cost and all else at three times.
    total: int = stem * (2 if trains else 1) + (blocks + attention) * (3 if trains else 1)
    return total


def _projector(config: SailVLConfig, shape: Shape, trains: Collection[str], rank: int | None) -> int:
    merged, width = config.vision_config.hidden_size * config.merge**2, config.text_config.hidden_size
    rows = sum(shape.patches(config)) // config.merge**2
    forward = 2 * rows * (merged * width + width * width)
    if "projector" in trains and rank is not None:
        unseen = 0 if "vit" in trains else merged
        return int(2 * forward - 2 * rows * unseen * width + _adapters(rows, rank, merged + 3 * width, unseen))
    total: int = forward * (1 + ("vit" in trains or "projector" in trains) + ("projector" in trains))
    return total


def _lm(config: SailVLConfig, shape: Shape, trains: Collection[str], rank: int | None, attention_factor: int) -> int:
    text = config.text_config
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    weights = text.num_hidden_layers * text.hidden_size * (2 * queries + 2 * keys) + _mlp_weights(text)
    linear = 2 * weights * sum(shape.lengths)
    head = 2 * text.hidden_size * text.vocab_size * shape.num_supervised
    attention = attention_factor * text.num_hidden_layers * queries * sum(length**2 for length in shape.lengths)
    if "lm" in trains and rank is not None:
        unseen = 3 * text.hidden_size if len(trains) == 1 else 0  # what the first query, key and value see
        sides = text.num_hidden_layers * (4 * text.hidden_size + 2 * queries + 2 * keys)
        sides += dense_layers(text) * 3 * (text.hidden_size + text.intermediate_size)
        frozen = 2 * text.hidden_size * (queries + 2 * keys) * sum(shape.lengths) if unseen else 0
        extra = _adapters(sum(shape.lengths), rank, sides, unseen)
        return int(2 * (linear + head) + 3 * attention - frozen + extra)
    # Whatever trains lies at or before the language model, so gradients always pass through all of it.
    total: int = (linear + head) * (3 if "lm" in trains else 2) + 3 * attention
    return total


def dense_layers(text: Any) -> int:
    """Layers of a language model without experts."""
    layers: int = text.num_hidden_layers
    if not getattr(text, "num_experts", 0):
        return layers
    return sum(index in text.mlp_only_layers or (index + 1) % text.decoder_sparse_step != 0 for index in range(layers))


def _mlp_weights(text: Any) -> int:
    """Weights of all layers' feed-forward blocks that one token meets: of a sparse layer the router and K experts."""
    dense = dense_layers(text)
    total: int = dense * 3 * text.hidden_size * text.intermediate_size
    if dense < text.num_hidden_layers:
        active = text.hidden_size * (text.num_experts + 3 * text.num_experts_per_tok * text.moe_intermediate_size)
        total += (text.num_hidden_layers - dense) * active
    return total
