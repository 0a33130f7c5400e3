"""One optimizer step: forward, loss, backward, clip, update. The only file that calls ``backward``.

A step takes one batch from every lane. Its loss is the sum of cross-entropies over all of them divided by all of
their supervised tokens: a mean of means would weigh tokens by how full their pack is.

Nothing here waits for the device. Loss and gradient norm stay tensors, and when they are not finite the *device* skips
the update: fused AdamW leaves weights, moments and step counts alone where ``found_inf`` is 1. Frozen leading parts
build no graph, because autograd records nothing without a trainable input; the vision encoder and projector are
called even for a batch without pictures, so every process of a future group does the same work.

bf16 is autocast over fp32 master weights (on one device; sharded training casts by its own policy). The loss runs
outside of autocast and casts explicitly, because its logits must be fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.train import optim
from sailvl.train.loss import cross_entropy_sum
from sailvl.types import Batch


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """``values`` holds (mean loss in nats per supervised token, gradient norm before clipping) on the device.

    Both are 0 and nothing was updated when the step had no supervised token.
    """

    values: torch.Tensor
    supervised_tokens: int


def train_step(
    model: SailVLForConditionalGeneration,
    batches: Sequence[Batch],
    optimizer: torch.optim.AdamW,
    *,
    max_grad_norm: float,
    precision: str,
) -> StepResult:
    """Update the model once with all ``batches``. ``precision`` is "fp32" or "bf16" (see ``resolve_precision``)."""
    supervised = sum(len(batch.targets_R) for batch in batches)
    device = model.lm_head.weight.device
    if supervised == 0:
        return StepResult(values=torch.zeros(2, device=device), supervised_tokens=0)
    loss = torch.zeros((), device=device)
    for batch in batches:
        part = loss_sum(model, batch, precision) / supervised
        part.backward()  # type: ignore[no-untyped-call]
        loss = loss + part.detach()
    norm = torch.nn.utils.clip_grad_norm_(list(optim.parameters(optimizer)), max_grad_norm)
    values = torch.stack((loss, norm.to(loss.dtype)))
    optimizer.found_inf = (~torch.isfinite(values).all()).to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(values=values, supervised_tokens=supervised)


def loss_sum(model: SailVLForConditionalGeneration, batch: Batch, precision: str) -> torch.Tensor:
    """Sum of the cross-entropies of one batch's supervised rows, in nats."""
    device = model.lm_head.weight.device
    offsets = batch.cu_seqlens.to(device, non_blocking=True)
    bf16 = precision == "bf16"
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        hidden_1TD = model.model(
            input_ids=batch.ids_T[None].to(device, non_blocking=True),
            position_ids=batch.positions_T[None].to(device, non_blocking=True),
            pixel_values=batch.tiles_N3SS.to(device, model.dtype, non_blocking=True),
            image_grid_hw=batch.grids_N2,
            cu_seq_lens_q=offsets,
            cu_seq_lens_k=offsets,
            max_length_q=batch.max_length,
            max_length_k=batch.max_length,
            use_cache=False,
        ).last_hidden_state
    return cross_entropy_sum(
        hidden_1TD[0].index_select(0, batch.rows_R.to(device, non_blocking=True)),
        model.lm_head.weight,
        batch.targets_R.to(device, non_blocking=True),
        compute_dtype=torch.bfloat16 if bf16 else None,
    )


def resolve_precision(precision: str, device: torch.device) -> str:
    """What "auto" means here: bf16 where the hardware multiplies it faster than fp32, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"
