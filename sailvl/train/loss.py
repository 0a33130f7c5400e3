"""Cross-entropy of the supervised rows without ever holding all their logits.

Logits for a whole pack are the largest tensor of training (8,192 rows x 151,936 tokens in fp32: 5 GB, and their
gradient as much again). Here only supervised rows enter, a chunk at a time, and each chunk's gradient is computed
while its logits are at hand, so nothing of size rows x vocabulary outlives a chunk. Recomputing chunks in the
backward pass instead would cost a second multiplication with the head.

A row may have a weight, and a penalty on the softmax's normalizer may join its cross-entropy: z logsumexp^2 keeps
logits from drifting where the softmax cannot see it (PaLM, arXiv 2204.02311, uses z = 1e-4). The report (arXiv
2509.14033) names neither; without them the arithmetic is what it would be if they did not exist.

The head's gradient is computed only if the head trains. Softmax and sums run in fp32 (fp64 for fp64 input), the
multiplications in ``compute_dtype``; a bf16 chunk's head gradient is rounded once before it is added up in fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from sailvl.train.activations import CHUNK_LOGITS

MAX_CHUNK_LOGITS = CHUNK_LOGITS
"""Logits of a chunk: 128 MiB in fp32, 4,096 rows of the nano vocabulary, 220 of Qwen3's."""


def cross_entropy_sum(
    hidden_RD: torch.Tensor,
    head_VD: torch.Tensor,
    targets_R: torch.Tensor,
    *,
    weights_R: torch.Tensor | None = None,
    z_loss: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    max_chunk_logits: int = MAX_CHUNK_LOGITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(objective, cross_entropy), two scalars in nats, of logits = hidden @ head.T and w = ``weights_R`` (None: 1).

    objective = sum over rows of w (CE + z_loss logsumexp(logits)^2), CE = -log softmax(logits)[target], can be
    differentiated once, in ``hidden_RD`` and ``head_VD``; cross_entropy = sum of w CE cannot, and is for the log.
    ``compute_dtype`` (default: the hidden states' own) is the dtype of the multiplications. Zero rows give 0 with
    zero gradients, so that a pack without supervision still takes part in every collective operation. Raises
    ValueError if the numbers of rows differ.
    """
    if len(hidden_RD) != len(targets_R):
        raise ValueError(f"{len(hidden_RD)} hidden rows but {len(targets_R)} targets")
    if weights_R is not None and len(weights_R) != len(targets_R):
        raise ValueError(f"{len(targets_R)} targets but {len(weights_R)} weights")
    chunk_rows = max(1, max_chunk_logits // len(head_VD))
    objective, cross_entropy = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_RD,
        head_VD,
        targets_R,
        weights_R,
        z_loss,
        compute_dtype or hidden_RD.dtype,
        chunk_rows,
        torch.is_grad_enabled(),
    )
    return objective, cross_entropy


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are made in ``forward`` and only multiplied by the incoming scalar in ``backward``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: torch.Tensor,
        head_VD: torch.Tensor,
        targets_R: torch.Tensor,
        weights_R: torch.Tensor | None,
        z_loss: float,
        compute_dtype: torch.dtype,
        chunk_rows: int,
        differentiate: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden = differentiate and ctx.needs_input_grad[0]
        needs_head = differentiate and ctx.needs_input_grad[1]
        sum_dtype = torch.promote_types(compute_dtype, torch.float32)
        head = head_VD.to(compute_dtype)
        total = hidden_RD.new_zeros((), dtype=sum_dtype)
        penalty = torch.zeros_like(total)
        grad_hidden = torch.empty_like(hidden_RD) if needs_hidden else None
        grad_head = torch.zeros_like(head_VD, dtype=sum_dtype) if needs_head else None
        for begin in range(0, len(targets_R), chunk_rows):
            rows = slice(begin, begin + chunk_rows)
            hidden, targets = hidden_RD[rows].to(compute_dtype), targets_R[rows, None]
            logits_RV = (hidden @ head.T).to(sum_dtype)
            log_sum_R = logits_RV.logsumexp(1, keepdim=True)
            weights = None if weights_R is None else weights_R[rows, None].to(sum_dtype)
            total += _weighted(log_sum_R - logits_RV.gather(1, targets), weights).sum()
            if z_loss:
                penalty += z_loss * _weighted(log_sum_R.square(), weights).sum()
            if grad_hidden is None and grad_head is None:
                continue
            grad_RV = logits_RV.sub_(log_sum_R).exp_()
            if z_loss:
                grad_RV.mul_(1 + 2 * z_loss * log_sum_R)  # the gradient of logsumexp is the softmax too
            grad_RV.scatter_add_(1, targets, -torch.ones_like(log_sum_R))
            if weights is not None:
                grad_RV.mul_(weights)
            grad_logits = grad_RV.to(compute_dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ head
            if grad_head is not None:
                grad_head += grad_logits.T @ hidden
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head_VD.dtype))
        cross_entropy = total.clone()
        ctx.mark_non_differentiable(cross_entropy)
        return total + penalty if z_loss else total, cross_entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors]
        return (*grads, None, None, None, None, None, None)


def _weighted(rows: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return rows if weights is None else rows * weights
