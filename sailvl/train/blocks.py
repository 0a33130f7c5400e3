"""What is done to one block: forgetting its activations, and compiling it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint

PRODUCTS = tuple(
    getattr(library, name).default
    for library, name in (
        *((torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")),
        *((torch.ops.aten, f"_scaled_dot_product_{kind}") for kind in ("flash_attention", "efficient_attention")),
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"),
        (torch.ops.torch_attn, "_varlen_attn"),  # there once ``model.attention`` has imported it
    )
    if hasattr(library, name)
)
"""Operations whose results "selective" checkpointing keeps: much work for few bytes."""


def recompute(block: nn.Module, kind: str) -> None:
    """Let ``block`` forget its activations. Its own ``forward`` is replaced, so that no name of a weight changes."""
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = functools.partial(checkpoint.create_selective_checkpoint_contexts, list(PRODUCTS))
    block.forward = functools.partial(checkpoint.checkpoint, block.forward, **options)


def compile_parts(block: nn.Module, backend: str | Callable[..., Any]) -> None:
    """Compile what a block does to each position by itself, its norms and dense MLP, each as one graph for all sizes.

    Attention by documents, which reads their lengths on the host, and experts stay as they are: a block compiled as a
    whole would break into pieces there, and not be compiled at all while its activations are recomputed.
    """
    for name, part in block.named_children():
        if "norm" in name or (name == "mlp" and not hasattr(part, "experts")):
            part.compile(fullgraph=True, dynamic=True, backend=backend)
