"""One optimizer step: forward, loss, backward, clip, update. The only file that calls ``backward``.

A step takes one batch from every lane, each process those of its own lanes. Its loss is the sum of cross-entropies over
all of them divided by all of their supervised tokens (or the sum of their weights): a mean of means would weigh tokens
by how full their pack is, and by how packs are spread over processes. The divisor, and what else the processes must
agree on, is exchanged on the host once, before the first forward pass.

Nothing here waits for the device. Loss and gradient norm stay tensors, and when they are not finite the *device* skips
the update: fused AdamW leaves weights, moments and step counts alone where ``found_inf`` is 1. Frozen leading parts
build no graph, because autograd records nothing without a trainable input; the vision encoder and projector are
called even for a batch without pictures, so that every process takes part in the same collective operations.

On one process bf16 is autocast over fp32 master weights; sharded weights are cast by their own policy (``parallel``).
The loss runs outside of autocast and casts explicitly, because its logits must be fp32.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch.distributed.fsdp import FSDPModule

from sailvl import dist
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.model.moe import Routing, record_routing, sparse_layers
from sailvl.train import optim, parallel
from sailvl.train.balance import RouterTerms, balance_loss, fractions, router_terms
from sailvl.train.loss import cross_entropy_sum
from sailvl.types import Batch

Routers = RouterTerms | Routing | None
"""What watches the experts of a step: to balance them, only to count, or nothing because there are none."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """``values`` holds (mean cross-entropy in nats per supervised token, gradient norm before clipping), on the device
    and the same on all processes. Both are 0 and nothing was updated when no process had a supervised token.

    ``supervised_tokens`` are those of all processes. ``expert_counts`` int64 [L, E]: how often all tokens of the step
    chose each expert (None: no experts, or nothing was run). ``notes`` are the sums over processes of what was noted,
    ``waited`` the seconds in which this process waited for the others before the first forward pass.
    """

    values: torch.Tensor
    supervised_tokens: int
    expert_counts: torch.Tensor | None = None
    notes: tuple[float, ...] = ()
    waited: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the loss of a pass is made of: its divisor ``weight`` (of the whole step), ``precision``, the weight of the
    softmax's normalizer, and of the balance of experts with the ``fractions`` of the last step and its ``num_tokens``.
    """

    weight: float
    precision: str
    z_loss: float = 0.0
    balance: float = 0.0
    fractions_LE: torch.Tensor | None = None
    num_tokens: int = 0


def train_step(
    model: SailVLForConditionalGeneration,
    batches: Sequence[Batch],
    optimizer: torch.optim.AdamW,
    *,
    max_grad_norm: float,
    precision: str,
    z_loss: float = 0.0,
    balance: float = 0.0,
    expert_counts: torch.Tensor | None = None,
    packs_per_forward: int = 1,
    notes: Sequence[float] = (),
) -> StepResult:
    """Update the model once with all ``batches`` (this process's; every process calls with its own, equally many).

    ``precision`` is "fp32" or "bf16" (see ``resolve_precision``). ``balance`` weighs the balance of experts, by the
    ``expert_counts`` of the step before (None: there was none, and it is left out). ``notes`` are numbers of this
    process to be added up over all of them on the way.
    """
    counts = (len(batch.targets_R) for batch in batches), (len(batch.ids_T) for batch in batches)
    arrived = time.perf_counter()
    supervised, num_tokens, weight, *noted = dist.sums([*map(sum, counts), sum(map(_weight, batches)), *notes])
    waited = time.perf_counter() - arrived
    device = parallel.device_of(model)
    if supervised == 0:
        return StepResult(values=torch.zeros(2, device=device), supervised_tokens=0, notes=tuple(noted), waited=waited)
    terms = Terms(
        weight=weight,
        precision=precision,
        z_loss=z_loss,
        balance=balance,
        fractions_LE=None if expert_counts is None else fractions(expert_counts).to(device),
        num_tokens=round(num_tokens),
    )
    passes = [batches[i : i + packs_per_forward] for i in range(0, len(batches), packs_per_forward)]
    loss = torch.zeros((), device=device)
    with _routers(model, balance) as routers:
        for number, packs in enumerate(passes, start=1):
            parallel.begin_pass(model, is_last=number == len(passes))
            objective, part = parallel.call(model, _losses, joined(packs), terms, routers)
            objective.backward()  # type: ignore[no-untyped-call]
            loss = loss + part
    parallel.add_up_experts(model)
    chosen = None if routers is None else dist.add_up(routers.counts)
    norm = parallel.clip(optim.parameters(optimizer), max_grad_norm)
    values = torch.stack((dist.add_up(loss), norm.to(loss)))
    optimizer.found_inf = (~torch.isfinite(values).all()).to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(
        values=values, supervised_tokens=round(supervised), expert_counts=chosen, notes=tuple(noted), waited=waited
    )


def loss_sum(model: SailVLForConditionalGeneration, batch: Batch, precision: str) -> torch.Tensor:
    """Sum of the (weighted) cross-entropies of one batch's supervised rows, in nats."""
    return parallel.call(model, _losses, batch, Terms(weight=1.0, precision=precision), None)[0]


def _losses(
    model: SailVLForConditionalGeneration, batch: Batch, terms: Terms, routers: Routers
) -> tuple[torch.Tensor, torch.Tensor]:
    """(objective, cross-entropy) of one forward pass, shares of the step's; runs where the root's weights are whole."""
    device = model.lm_head.weight.device
    offsets = batch.cu_seqlens.to(device, non_blocking=True)
    bf16 = terms.precision == "bf16"
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
    with nullcontext() if isinstance(model, FSDPModule) else autocast:
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
    weights_R = batch.weights_R
    objective, cross_entropy = cross_entropy_sum(
        hidden_1TD[0].index_select(0, batch.rows_R.to(device, non_blocking=True)),
        model.lm_head.weight,
        batch.targets_R.to(device, non_blocking=True),
        weights_R=None if weights_R is None else weights_R.to(device, non_blocking=True),
        z_loss=terms.z_loss,
        compute_dtype=torch.bfloat16 if bf16 else None,
    )
    objective, cross_entropy = objective / terms.weight, cross_entropy / terms.weight
    if isinstance(routers, RouterTerms):
        sums_LE = routers.take()
        if terms.fractions_LE is not None and sums_LE.requires_grad:
            objective = objective + terms.balance * balance_loss(sums_LE, terms.fractions_LE, terms.num_tokens)
    return objective, cross_entropy


def _weight(batch: Batch) -> float | torch.Tensor:
    """What the rows of a batch weigh in the loss together (on the host, where batches are)."""
    return len(batch.targets_R) if batch.weights_R is None else batch.weights_R.sum(dtype=torch.float64)


def _routers(model: SailVLForConditionalGeneration, balance: float) -> AbstractContextManager[Routers]:
    """What counts experts' choices, and sums routers' probabilities too if they are learned from; no more is paid."""
    if not sparse_layers(model):
        return nullcontext()
    return router_terms(model) if balance else record_routing(model, keep_ids=False)


def joined(packs: Sequence[Batch]) -> Batch:
    """Packs of several lanes as one: the documents stay apart, and the result is theirs to rounding."""
    first = packs[0]
    if len(packs) == 1:
        return first
    begins = [sum(len(pack.ids_T) for pack in packs[:index]) for index in range(len(packs))]
    offsets = [pack.cu_seqlens[1:] + begin for pack, begin in zip(packs, begins, strict=True)]
    grids = [pack.grids_N2 for pack in packs if pack.grids_N2 is not None]
    weights = [pack.weights_R for pack in packs if pack.weights_R is not None]
    return replace(
        first,
        ids_T=torch.cat([pack.ids_T for pack in packs]),
        positions_T=torch.cat([pack.positions_T for pack in packs]),
        cu_seqlens=torch.cat([first.cu_seqlens[:1], *offsets]),
        max_length=max(pack.max_length for pack in packs),
        tiles_N3SS=torch.cat([pack.tiles_N3SS for pack in packs]),
        rows_R=torch.cat([pack.rows_R + begin for pack, begin in zip(packs, begins, strict=True)]),
        targets_R=torch.cat([pack.targets_R for pack in packs]),
        weights_R=torch.cat(weights) if weights else None,
        grids_N2=torch.cat(grids) if grids else None,
        rejects=tuple(reject for pack in packs for reject in pack.rejects),
    )


def resolve_precision(precision: str, device: torch.device) -> str:
    """What "auto" means here: bf16 where the hardware multiplies it faster than fp32, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"
