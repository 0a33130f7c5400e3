"""Expert parallelism: the experts of a layer spread over processes, tokens sent to their experts and back.

Each of K processes keeps E / K experts. It sorts its tokens' choices by expert, tells every process how many rows come,
sends them, runs its own experts on what it received, and sends the results back to where the tokens live. The outcome
is that of one process with all experts, to rounding; gradients travel the same way backwards, so a process's experts
collect theirs from every token that chose them, wherever it was.

A process whose experts nobody chose still takes part: it runs no products, but its weights get a gradient of zero.

Cost: two exchanges of (choices x width) values in a layer's forward pass and two in its backward pass, and one wait for
the counts, which say how much memory to receive into. The counts travel by the same group as the rows.
(The report, arXiv 2509.14033, trains its sparse model without saying how its experts are placed.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

Run = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Experts, hidden states [M, D], ids [M, 1] and weights [M, 1] to outputs [M, D]."""


def share(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Keep this process's part of the experts, in place: weights become DTensors, split along the experts.

    ``mesh`` is [copies, K]: processes of a row share one set of experts, those of a column hold the same ones.
    Raises ValueError if K does not divide the experts.
    """
    members, own = mesh.size(1), mesh.get_local_rank(1)
    if experts.num_experts % members:
        raise ValueError(f"{experts.num_experts} experts cannot be shared evenly by {members} processes")
    for name, whole in list(experts.named_parameters(recurse=False)):
        part = whole.detach().chunk(members)[own].to(mesh.device_type, copy=True)
        spread = DTensor.from_local(part, mesh, (Replicate(), Shard(0)), run_check=False)
        experts.register_parameter(name, nn.Parameter(spread, requires_grad=whole.requires_grad))
    experts.shared_by = mesh  # read by ``moe.grouped_experts``


def dispatched_experts(
    experts: nn.Module, hidden_ND: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor, run: Run
) -> torch.Tensor:
    """Weighted outputs [N, D] of the chosen experts, each run by the process that keeps it, with ``run``."""
    mesh: DeviceMesh = experts.shared_by
    group, members = mesh.get_group(1), mesh.size(1)
    local = _local(experts, hidden_ND.dtype, members)
    (num_tokens, top_k), width = ids_NK.shape, hidden_ND.shape[-1]

    ids_S, order_S = ids_NK.reshape(-1).sort(stable=True)
    counts_E = torch.zeros(experts.num_experts, dtype=torch.long, device=ids_S.device)
    counts_E.scatter_add_(0, ids_S, torch.ones_like(ids_S))
    arriving_E = torch.empty_like(counts_E)  # by sender, then by expert of mine
    distributed.all_to_all_single(arriving_E, counts_E, group=group)
    sent, received = (counts.view(members, -1).sum(1).tolist() for counts in (counts_E, arriving_E))

    rows_MD = _Exchange.apply(hidden_ND[order_S // top_k], sent, received, group)
    mine_M = torch.arange(local.num_experts, device=ids_S.device).repeat(members).repeat_interleave(arriving_E)
    if len(rows_MD):
        rows_MD = run(local, rows_MD, mine_M[:, None], rows_MD.new_ones(len(rows_MD), 1))
    else:  # no products of nothing, but zero gradients: a missing one would end the step differently here
        rows_MD = rows_MD + sum((weight.sum() for weight in local.parameters()), rows_MD.new_zeros(())) * 0
    sorted_SD = _Exchange.apply(rows_MD, received, sent, group)

    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    outputs_NKD = (sorted_SD[back_S] * weights_NK.reshape(-1, 1)).view(num_tokens, top_k, width)
    return outputs_NKD.sum(dim=1).to(hidden_ND.dtype)


def _local(experts: nn.Module, dtype: torch.dtype, members: int) -> Any:
    """The same module with this process's experts alone, in the dtype of the hidden states (gradients keep theirs)."""
    local: Any = copy.copy(experts)
    local._parameters = {name: value.to_local().to(dtype) for name, value in experts.named_parameters(recurse=False)}
    local.num_experts, local.shared_by = experts.num_experts // members, None
    return local


class _Exchange(torch.autograd.Function):
    """Rows to other processes: ``sent[i]`` of them to process i of the group, ``received[i]`` from it."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _exchanged(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchanged(rows: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
    arrived = rows.new_empty((sum(received), *rows.shape[1:]))
    distributed.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
