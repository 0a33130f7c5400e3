"""What the backward pass makes the forward pass keep, in closed form from configurations alone. No torch.

Per token, tensor by tensor, of the blocks here and in transformers 5: inputs of norms (as fp32 in every precision),
rotated queries and keys, values and attention's output, gate and up; with weights that train also the norms' outputs
and the inputs of matrix products. Attention is taken to be a fused kernel, which keeps no scores.
``precision`` is "fp32", "autocast" (bf16 products of fp32 weights: bf16 on one process) or "bf16" (sharded weights).

``tests/train/test_memory.py`` counts what a real pass keeps, ``benchmarks/memory.py`` measures whole steps.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sailvl.train.flops import Shape, dense_layers, vit_layers

CHUNK_LOGITS = 1 << 25
"""Logits that the loss holds at once (``loss``)."""


def lm_activations(config: Any, *, trains: bool, precision: str, sparse: bool = False) -> int:
    """Bytes that one block of the language model keeps for each token until its backward pass.

    ``precision``: "fp32", "autocast" (bf16 products of fp32 weights) or "bf16" (sharded). ``trains``: its weights do.
    """
    text = config.text_config
    width, queries = text.hidden_size, text.num_attention_heads * text.head_dim
    keys, heads = text.num_key_value_heads * text.head_dim, text.num_attention_heads
    size = 4 if precision == "fp32" else 2
    small = 4 * (2 + 2 * heads + text.num_key_value_heads)  # of norms and softmax, a number a row
    # Inputs of the four norms, as fp32 whatever the precision; then rotated queries and keys, values, attention's
    # output. A block that trains keeps the norms' outputs and the inputs of its products too.
    wide = 2 * width + queries + keys
    narrow = 2 * queries + 2 * keys
    if trains:
        norms = 2 * width  # fp32 under autocast, and each product casts its own copy
        if precision == "autocast":
            wide += norms
            narrow += 5 * width
        else:
            narrow += norms + 2 * width
        narrow += 2 * queries + keys
    feed = (_sparse_feed if sparse else _dense_feed)(text, trains, size)
    return int(4 * wide + size * narrow + small + feed)


def _dense_feed(text: Any, trains: bool, size: int) -> int:
    return int(size * (4 if trains else 3) * text.intermediate_size)


def _sparse_feed(text: Any, trains: bool, size: int) -> int:
    """Of the chosen experts: gathered inputs, gate and up, their product; of the router its probabilities."""
    chosen, inner = text.num_experts_per_tok, text.moe_intermediate_size
    rows = (2 * text.hidden_size + 4 * inner) if trains else (text.hidden_size + 3 * inner)
    return int(size * chosen * rows + 4 * text.num_experts + 40 * chosen)


def vit_activations(config: Any, *, precision: str) -> int:
    """Bytes that a block of the encoder keeps for each patch; none if it does not train, as nothing before it does."""
    vision = config.vision_config
    width, inner, small = vision.hidden_size, vision.intermediate_size, 4 * (2 + vision.num_attention_heads)
    if precision == "fp32":
        return int(4 * (10 * width + 4 * inner) + small)
    wide, narrow = (4, 7) if precision == "autocast" else (2, 8)
    return int(4 * wide * width + 2 * (narrow * width + 4 * inner) + small)


def kept(config: Any, shape: Shape, trains: Collection[str], precision: str, checkpointing: str) -> tuple[int, int]:
    """(bytes of activations that wait for the backward pass, those of the largest block that is computed again)."""
    vision, text = config.vision_config, config.text_config
    tokens, patches = sum(shape.lengths), sum(shape.patches(config))
    size = 4 if precision == "fp32" else 2
    residual = 2 if precision == "bf16" else 4
    merged, width = vision.hidden_size * config.merge**2, text.hidden_size
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    dense, layers = dense_layers(text), text.num_hidden_layers
    total, again = 0, 0

    of = {
        sparse: tokens * lm_activations(config, trains="lm" in trains, precision=precision, sparse=sparse)
        for sparse in (False, True)
        if (layers - dense if sparse else dense)
    }
    if checkpointing == "none":
        total += sum(bytes_ * (layers - dense if sparse else dense) for sparse, bytes_ in of.items())
    else:
        again = max(of.values())
        products = residual * width
        if checkpointing == "selective":
            inner = text.num_experts_per_tok * (3 * text.moe_intermediate_size + width) if True in of else 0
            inner = max(inner, 2 * text.intermediate_size + width if False in of else 0)
            products += size * (2 * queries + 2 * keys + width + inner)
        total += layers * tokens * products
    total += tokens * (2 * text.head_dim * size + 4 * width * (2 if "lm" in trains else 1))  # angles, final norm
    total += tokens * width * residual  # what the head gets

    if "vit" in trains:
        of_block = patches * vit_activations(config, precision=precision)
        blocks = vit_layers(config)
        if checkpointing == "none":
            total += blocks * of_block
        else:
            again = max(again, of_block)
            kept = residual * vision.hidden_size
            if checkpointing == "selective":
                kept += size * (5 * vision.hidden_size + 2 * vision.intermediate_size + vision.hidden_size)
            total += blocks * patches * kept
        pixels = size * vision.num_channels * vision.patch_size**2
        total += patches * (pixels + 16 * vision.hidden_size)  # first and last norm
    rows = patches // config.merge**2
    if "vit" in trains or "projector" in trains:
        total += rows * merged * (6 if precision == "autocast" else 2 * size) + rows * 2 * width * size
    total += 4 * patches * vision.num_channels * vision.patch_size**2  # the pixels themselves
    return total, again


def loss_transient(config: Any, shape: Shape, *, head_trains: bool, precision: str) -> int:
    """The largest transient of the head: a chunk of logits with what its softmax needs, beside the gradients made."""
    text = config.text_config
    rows = shape.num_supervised
    chunk = min(rows, max(1, CHUNK_LOGITS // text.vocab_size)) * text.vocab_size
    head = text.vocab_size * text.hidden_size
    narrow = precision != "fp32"
    forward = 8 * chunk + 2 * rows * text.hidden_size * 4 + (2 * head if narrow else 0)
    if not head_trains:
        return int(forward)
    # The head's gradient: the sum so far and a chunk's; in the backward pass its product with a scalar.
    return int(max(forward + 4 * head + (2 if narrow else 4) * head, 8 * head))
