"""Packed attention: several documents in one sequence, none of which sees another.

``sailvl_packed`` is registered with transformers' attention interface. Given document offsets (``cu_seq_lens_q``) it
attends within each document alone; without them it is the library's scaled dot product attention, so padded batches and
cached generation are unchanged. The documents are split, attended causally one by one, and joined: the cost is the sum
of the squared document lengths, no T x T mask is ever built, and each document's result is bitwise what it would be
alone. On a GPU ``flash_attention_2`` or ``flash_attention_3`` take the same offsets in one kernel call; this one works
there too, with one call per document and a wait for the offsets in every layer. (The report packs samples with
"per-sample attention", arXiv 2509.14033 section 3; it names no kernel.)

Bitwise equality holds for this operation, not for a whole model: matrix products depend on the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "sailvl_packed"
"""Name of the attention implementation."""

PACKING_IMPLEMENTATIONS = (PACKED, "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Implementations that honour document offsets; every other would silently attend across documents."""


SHORT = 256
"""Up to this many positions attention may be plain matrix products, whose memory is quadratic."""


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query [B, H, T, K] over key and value [B, KV, T, K]; returns [B, T, H, K] and None.

    With ``cu_seq_lens_q`` (int32 [documents + 1]) the batch must be one row. Raises ValueError if it is not, or if the
    offsets do not end at T.
    """
    if cu_seq_lens_q is None:
        return _attend(module, query, key, value, attention_mask, **kwargs)
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"packed attention takes one row of equal query and key length, got {query.shape[0]} rows, "
            f"{query.shape[2]} queries and {key.shape[2]} keys: do not batch or cache packs"
        )
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    if sum(lengths) != query.shape[2] or min(lengths, default=0) < 0:
        raise ValueError(f"document lengths {lengths} do not add up to the {query.shape[2]} tokens of the pack")
    # An empty document has no rows to attend; splitting once keeps the backward pass one concatenation.
    lengths = [length for length in lengths if length]
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = [_attend(module, q, k, v, None, **kwargs)[0] for q, k, v in parts]
    return torch.cat(outputs, dim=1), None


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The library's scaled dot product attention, or plain matrix products where those train faster.

    The fused CPU kernel's backward pass is slow in half precision: for tiles of 64 patches and documents of about a
    hundred tokens, matrix products take 0.2 and 0.4 of its time.
    """
    length = query.shape[2]
    # Rotary embedding leaves fp32 queries under autocast, which casts them at the next matrix product.
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if (
        attention_mask is None
        and length == key.shape[2] <= SHORT
        and query.device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and query.requires_grad
        and not kwargs.get("dropout")
    ):
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        if key.shape[1] != query.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        scores = (query * scaling) @ key.transpose(2, 3)
        is_causal = kwargs.get("is_causal")
        if module.is_causal if is_causal is None else is_causal:
            scores = scores + scores.new_full((length, length), float("-inf")).triu(1)
        return (scores.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain formula, for reference and for ``attn_implementation="eager"``; returns [B, T, H, K] and weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
