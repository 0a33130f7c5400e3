"""Packed attention: several documents in one sequence, none of which sees another.

``sailvl_packed`` is registered with transformers' attention interface. Given document offsets (``cu_seq_lens_q``) it
attends within each document alone; without them it is the library's scaled dot product attention, so padded batches and
cached generation are unchanged. The documents are split, attended causally one by one, and joined: the cost is the sum
of the squared document lengths, no T x T mask is ever built, and each document's result is bitwise what it would be
alone. (The report packs samples with "per-sample attention", arXiv 2509.14033 section 3; it names no kernel.)

On a GPU in half precision all documents are one call of torch's variable-length kernel, which takes the offsets where
they are: nothing is read back to the host. This is written against torch 2.13 and **untested on a GPU**; where the
kernel is missing, too old, or the precision is fp32, documents go one by one, with a wait for the offsets in every
layer. ``flash_attention_2`` and ``flash_attention_3`` take the same offsets through transformers.

Bitwise equality holds for this operation, not for a whole model: matrix products depend on the number of rows.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a torch without it
    varlen_attn = None

PACKED = "sailvl_packed"
"""Name of the attention implementation."""

PACKING_IMPLEMENTATIONS = (PACKED, "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Implementations that honour document offsets; every other would silently attend across documents."""


SHORT = 256
"""Up to this many positions attention may be plain matrix products, whose memory is quadratic."""

HAS_KERNEL = (
    varlen_attn is not None and {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()
)
"""Whether torch has the variable-length kernel with the arguments used here: earlier ones said "causal" differently."""


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

    With ``cu_seq_lens_q`` (int32 [documents + 1]) the batch must be one row. Raises ValueError if it is not, or (but
    for the kernel of a GPU, which never shows them to the host) if the offsets do not end at T. ``max_length_q`` is the
    longest document's length, which that kernel is told; T if it is not given.
    """
    if cu_seq_lens_q is None:
        return _attend(module, query, key, value, attention_mask, **kwargs)
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"packed attention takes one row of equal query and key length, got {query.shape[0]} rows, "
            f"{query.shape[2]} queries and {key.shape[2]} keys: do not batch packs, nor extend a cache with one"
        )
    half = _kernel_dtype(query)
    if half is not None and not kwargs.get("dropout"):
        return _attend_varlen(module, query, key, value, cu_seq_lens_q, max_length_q, half, **kwargs), None
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    if sum(lengths) != query.shape[2] or min(lengths, default=0) < 0:
        raise ValueError(f"document lengths {lengths} do not add up to the {query.shape[2]} tokens of the pack")
    # An empty document has no rows to attend; splitting once keeps the backward pass one concatenation.
    lengths = [length for length in lengths if length]
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = [_attend(module, q, k, v, None, **kwargs)[0] for q, k, v in parts]
    return torch.cat(outputs, dim=1), None


def _kernel_dtype(query: torch.Tensor) -> torch.dtype | None:
    """The half precision in which the variable-length kernel attends for this query; None where it cannot."""
    if query.device.type != "cuda" or not HAS_KERNEL or not query.numel():
        return None
    # The kernel is no operation that autocast knows, and rotary embedding leaves fp32 queries under autocast.
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    is_served = dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return dtype if is_served and _is_ampere(query.device) else None


@functools.cache
def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _attend_varlen(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    max_length: int | None,
    dtype: torch.dtype,
    **kwargs: Any,
) -> torch.Tensor:
    """All documents of a pack in one call: [1, T, H, K] in ``dtype``."""
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    offsets = offsets.to(query.device, torch.int32, non_blocking=True)
    longest = max_length or query.shape[0]
    is_causal = kwargs.get("is_causal")
    is_causal = module.is_causal if is_causal is None else is_causal
    mixed = varlen_attn(
        query,
        key,
        value,
        offsets,
        offsets,
        longest,
        longest,
        scale=kwargs.get("scaling"),
        window_size=(-1, 0) if is_causal else (-1, -1),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return mixed[None]


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
