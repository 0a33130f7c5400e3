"""What a training step needs of memory, in closed form from configurations alone; no torch, no model is built.

Parameters are counted exactly, what is kept of them follows ``parallel``, activations ``activations``. Added up, they
are the peak of a step of several passes: gradients of the first are there when the second has its activations. (With
one pass a step, gradients come as activations go, and the peak is lower.)

Not seen: an allocator's fragmentation, and what libraries take for themselves; ``CONTEXT`` stands for the latter on a
GPU. ``benchmarks/memory.py`` compares with measurements.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from sailvl.curriculum import AdaLRS, Train
from sailvl.train import activations
from sailvl.train.flops import Shape, dense_layers

CONTEXT = 1_500_000_000
"""Bytes of a GPU that the CUDA context, cuBLAS's workspace and NCCL's buffers take. An assumption."""

MAX_REPLICATED, MAX_WAITING = 40_000_000_000, 12_000_000_000
"""Bytes of frozen weights that every process may keep whole, and of whole gradients that may wait (``parallel``)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process at the peak of a step.

    ``weights``, ``gradients`` and ``optimizer`` are what it keeps of each; ``gathered``: weights and gradients that are
    whole for a while, or cast; ``loss``: the largest transient beside activations; ``host``: in host memory.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int
    ema: int
    context: int
    host: int

    @property
    def total(self) -> int:
        """All of it, without the host's."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


# ---- parameters -----------------------------------------------------------------------------------------------------


def parameters(config: Any) -> dict[str, int]:
    """How many parameters each part has; ``config`` is a ``SailVLConfig`` or has its fields."""
    vision, text = config.vision_config, config.text_config
    width, merged, out = vision.hidden_size, vision.hidden_size * config.merge**2, text.hidden_size
    stem = vision.num_channels * vision.patch_size**2 * width + width + width + vision.num_patches * width
    return {
        "vit": stem + vision.num_hidden_layers * vit_block(config) + width,
        "projector": 2 * merged + merged * out + out + out * out + out,
        "lm": sum(lm_blocks(config)) + _outside(text),
    }


def vit_block(config: Any) -> int:
    """Parameters of a block of the vision encoder."""
    vision = config.vision_config
    width: int = vision.hidden_size
    total: int = 4 * width * width + 3 * width * vision.intermediate_size + 2 * width
    return total


def lm_blocks(config: Any) -> list[int]:
    """Parameters of each block of the language model."""
    text = config.text_config
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    attention = text.hidden_size * (2 * queries + 2 * keys) + 2 * text.head_dim + 2 * text.hidden_size
    dense, layers = dense_layers(text), text.num_hidden_layers
    found = [attention + 3 * text.hidden_size * text.intermediate_size] * dense
    if dense < layers:
        experts = text.num_experts * (text.hidden_size + 3 * text.hidden_size * text.moe_intermediate_size)
        found += [attention + experts] * (layers - dense)
    return found


def _outside(text: Any) -> int:
    """Embedding, final norm, and the head if it has weights of its own."""
    total: int = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2) + text.hidden_size
    return total


def adapters(config: Any, trains: Collection[str], rank: int) -> int:
    """Parameters of adapters of ``rank`` beside every linear layer of the parts (not beside experts)."""
    vision, text = config.vision_config, config.text_config
    merged, width = vision.hidden_size * config.merge**2, text.hidden_size
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    lm = text.num_hidden_layers * (4 * width + 2 * queries + 2 * keys)
    lm += dense_layers(text) * 3 * (width + text.intermediate_size)
    vit = vision.num_hidden_layers * (6 * vision.hidden_size + 3 * (vision.hidden_size + vision.intermediate_size))
    sides = {"vit": vit, "projector": merged + 3 * width, "lm": lm}
    return int(rank * sum(sides[part] for part in trains))


# ---- a step ---------------------------------------------------------------------------------------------------------


def step_memory(
    config: Any,
    shape: Shape,
    stage: Train,
    *,
    bf16: bool,
    processes: int = 1,
    context: int = CONTEXT,
) -> Memory:
    """Memory of each of ``processes`` at the peak of a step of ``stage`` whose packs are all of ``shape``.

    Frozen weights are taken to be exact in bf16, as released ones are.
    """
    own, trains, alone = stage.parallel, stage.trains, processes == 1
    precision = "fp32" if not bf16 else "autocast" if alone else "bf16"
    shape = shape.times(own.packs_per_forward)
    shares = processes // own.replicas
    learned, frozen, apart = _learned(config, stage, 1 if alone else own.experts)
    narrow = 2 if bf16 else 4
    if alone:
        weights, host = 4 * (learned + frozen), 0
        gathered = _cast_weights(config, stage) if bf16 else 0
    else:
        replicates = narrow * frozen <= MAX_REPLICATED
        held = 4 * (learned if replicates else learned + frozen) // shares
        host = held if own.offload else 0
        weights = held - host + 4 * apart + (narrow * frozen if replicates else 0)
        gathered = _gathered(config, stage, narrow, replicates) + _whole_gradients(config, stage, processes, narrow)
    states = 0 if host else 4 * (learned // shares + apart)
    host += 12 * (learned // shares) if own.offload and not alone else 0
    if isinstance(stage.schedule, AdaLRS):
        host += 12 * (learned // shares + apart)
    kept, again = activations.kept(config, shape, trains, precision, own.checkpointing)
    head_trains = "lm" in trains and stage.lora is None
    return Memory(
        weights=weights,
        gradients=states,
        optimizer=2 * states,
        gathered=gathered,
        activations=kept,
        loss=max(activations.loss_transient(config, shape, head_trains=head_trains, precision=precision), again),
        ema=0 if stage.ema is None else 4 * (learned // shares + apart),
        context=context,
        host=host,
    )


def experts(config: Any) -> int:
    """Parameters of all experts, without their routers."""
    text = config.text_config
    sparse = text.num_hidden_layers - dense_layers(text)
    return int(sparse and sparse * text.num_experts * 3 * text.hidden_size * text.moe_intermediate_size)


def _learned(config: Any, stage: Train, members: int) -> tuple[int, int, int]:
    """(parameters that train, that do not, and of shared experts what one of ``members`` keeps beside them)."""
    parts = parameters(config)
    if stage.lora is not None:
        return adapters(config, stage.trains, stage.lora.rank), sum(parts.values()), 0
    shared = experts(config) if members > 1 else 0
    learned = sum(parts[part] for part in stage.trains)
    frozen = sum(parts.values()) - learned
    if "lm" in stage.trains:
        return learned - shared, frozen, shared // members
    return learned, frozen - shared, shared // members


def _cast_weights(config: Any, stage: Train) -> int:
    """bf16 copies of weights that autocast makes and the backward pass needs: of blocks that are not run again."""
    parts, again = parameters(config), stage.parallel.checkpointing != "none"
    found = max(lm_blocks(config)) if again else sum(lm_blocks(config))
    if "vit" in stage.trains and not again:
        found += parts["vit"]
    if {"vit", "projector"} & set(stage.trains):
        found += parts["projector"]
    return 2 * found


def _gathered(config: Any, stage: Train, narrow: int, replicates: bool) -> int:
    """Whole weights: of the root always, of blocks two at a time ("zero3") or all of them ("zero2")."""
    root, sharded = _units(config, stage, everything=not replicates)
    zero3 = stage.parallel.shard == "zero3"
    return narrow * (root + (sum(sorted(sharded)[-2:]) if zero3 else sum(sharded)))


def _whole_gradients(config: Any, stage: Train, processes: int, narrow: int) -> int:
    """Gradients before they are added up: of a whole step where that is little, else of the root and two blocks."""
    root, sharded = _units(config, stage, everything=False)
    passes = stage.lanes // processes // stage.parallel.packs_per_forward
    whole = 4 * (root + sum(sharded))
    if passes > 1 and whole <= MAX_WAITING:
        return whole
    return (4 + narrow) * (root + sum(sorted(sharded)[-2:]))


def _units(config: Any, stage: Train, *, everything: bool) -> tuple[int, list[int]]:
    """(sharded parameters outside of blocks, those of each sharded block): what trains, or everything."""
    if stage.lora is not None and not everything:
        layers = config.text_config.num_hidden_layers + config.vision_config.num_hidden_layers
        return 0, [adapters(config, stage.trains, stage.lora.rank) // layers] * layers
    parts = parameters(config)
    chosen = set(parts) if everything else set(stage.trains)
    root, found = 0, []
    of_experts = experts(config) if stage.parallel.experts > 1 else 0
    if "vit" in chosen:
        found += [vit_block(config)] * config.vision_config.num_hidden_layers
        root += parts["vit"] - sum(found)
    if "projector" in chosen:
        root += parts["projector"]
    if "lm" in chosen:
        own = lm_blocks(config)
        found += [block - of_experts // len(own) for block in own]
        root += parts["lm"] - sum(own)
    return root, found
