"""A model over several processes: who keeps which weights, and when gradients are added up.

``wrap`` is called once, after ``optim.freeze`` and before the optimizer is built. On one process it leaves plain
tensors and applies checkpointing and compilation alone. On several, PyTorch's FSDP2 shards every block that trains and,
as the root, what lies outside of blocks: embedding, norms, projector, (tied) head. A block's weights are gathered while
it runs; "zero2" keeps them gathered until its backward pass, the root always does. In bf16 the gathered weights and all
arithmetic are bf16, kept weights and sums of gradients fp32; there is no autocast then.

The root's weights exist in whole only inside its forward pass, so what needs them, the loss too, runs in it: ``call``.

Every gradient is a *sum* over processes: the loss is divided by what the whole step supervises before backward
(``step.py``), and a mean over processes would divide twice. The sums are plain ones because gloo knows no other.

Weights that do not train are kept whole by every process, in the dtype of the arithmetic, and cost no communication;
unless that would lose digits or take more than ``MAX_REPLICATED``: then they are sharded like the others.

Shared experts are outside of all this (``model/dispatch.py``): processes that hold copies of the same ones add up
their gradients at the end of a step.

Nothing of this has run on GPUs yet; the tests use gloo on CPUs. (The report, arXiv 2509.14033, names no engine.)
"""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from sailvl import dist
from sailvl.config import ConfigError
from sailvl.curriculum import Parallel
from sailvl.model import dispatch
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.model.moe import sparse_layers
from sailvl.train import memory
from sailvl.train.blocks import compile_parts, recompute
from sailvl.train.shards import local, reshard, whole

T = TypeVar("T")

MAX_REPLICATED = memory.MAX_REPLICATED
"""Bytes of frozen weights that every process may keep whole: an 8B model in bf16, and not a 30B one."""

MAX_WAITING_GRADIENTS = memory.MAX_WAITING
"""Bytes of whole fp32 gradients that may wait for the last pass of a step: those of a 2B model, and not of 8B. Above,
every pass adds its own over the processes at once, which costs its communication and keeps a shard alone."""


def wrap(
    model: SailVLForConditionalGeneration,
    settings: Parallel,
    *,
    precision: str,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Prepare a model whose parts are frozen as the stage wants, in place; ``precision`` is "fp32" or "bf16".

    With several processes every process must hold the same weights, on the CPU or its device; afterwards trained ones
    are DTensors on its device. Raises ConfigError if the experts cannot be shared as asked.
    """
    dense = settings.experts > 1 and not sparse_layers(model)
    odd = [experts.num_experts for experts in _experts(model) if experts.num_experts % settings.experts]
    if dense or odd:
        text = "the language model has no experts to share" if dense else f"{odd[0]} experts do not divide evenly"
        raise ConfigError([("parallel.experts", f"{text} ({settings.experts} processes a set of experts)")])
    for block in blocks(model):
        if settings.checkpointing != "none" and (block in _lm_blocks(model) or _trains(block)):
            recompute(block, settings.checkpointing)
        if settings.compile:
            compile_parts(block, backend)
    if dist.world_size() > 1:
        _shard(model, settings, precision)


def blocks(model: SailVLForConditionalGeneration) -> list[nn.Module]:
    """The units that are sharded, checkpointed and compiled: blocks of encoder and language model, in order."""
    return [*model.model.vision_tower.trunk.blocks, *_lm_blocks(model)]


def call(model: SailVLForConditionalGeneration, function: Callable[..., T], *args: Any) -> T:
    """``function(model, *args)`` while the root's weights are whole. What it returns may be differentiated."""
    if not isinstance(model, FSDPModule):
        return function(model, *args)
    result: T = model.run_inside(function, *args)  # type: ignore[operator]
    if not torch.is_grad_enabled():  # no backward pass will come to put the weights back
        reshard(model)
    return result


def device_of(model: SailVLForConditionalGeneration) -> torch.device:
    """Where the model computes (its weights may wait in host memory)."""
    return dist.device() if isinstance(model, FSDPModule) else model.lm_head.weight.device


def begin_pass(model: SailVLForConditionalGeneration, *, is_last: bool) -> None:
    """Say before each forward pass of a step whether it is the step's last: when gradients are added up depends."""
    if not isinstance(model, FSDPModule):
        return
    waiting = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad and isinstance(p, DTensor))
    model.set_requires_gradient_sync(is_last or waiting > MAX_WAITING_GRADIENTS)
    model.set_requires_all_reduce(is_last)  # between replicas always once


def add_up_experts(model: SailVLForConditionalGeneration) -> None:
    """After a step's last backward pass: give the copies of shared experts the sum of their gradients."""
    for experts in _experts(model):
        mesh: DeviceMesh | None = getattr(experts, "shared_by", None)
        if mesh is None or mesh.size(0) == 1:
            continue
        for parameter in experts.parameters():
            if parameter.grad is not None:
                distributed.all_reduce(local(parameter.grad), group=mesh.get_group(0))


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients down to ``max_norm`` together; gives their norm from before, the same on all processes."""
    by_mesh: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        by_mesh[mesh_of(parameter)].append(parameter)
    if by_mesh.keys() <= {None}:
        return torch.nn.utils.clip_grad_norm_(by_mesh[None], max_norm)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]) for own in by_mesh.values()]
    norms = [whole(norm) for norm in norms]
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for own in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(own, max_norm, total)
    return total


def mesh_of(tensor: torch.Tensor) -> DeviceMesh | None:
    """The processes that share a tensor; None for a plain one."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def make_whole(model: SailVLForConditionalGeneration) -> None:
    """Undo ``wrap`` for a model that has finished training: plain weights in host memory on the main process.

    All processes must call it; the others keep nothing and must not use the model again.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                value = whole(parameter).cpu()
                kept = value if dist.is_main() else value.new_empty(0)
                module.register_parameter(name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
    for experts in _experts(model):
        experts.shared_by = None
    for module in [module for module in model.modules() if isinstance(module, FSDPModule)]:
        module.__class__ = type(module).__mro__[2]
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            hooks.clear()  # all of them are the sharding's: nothing else hooks into blocks or the root
    model.tie_weights()


# ---- sharding -------------------------------------------------------------------------------------------------------


def _shard(model: SailVLForConditionalGeneration, settings: Parallel, precision: str) -> None:
    device, world = dist.device(), dist.world_size()
    if settings.experts > 1:
        shape = (world // settings.experts, settings.experts)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copies", "experts"))
        for experts in _experts(model):
            _to_master(experts, set())
            dispatch.share(experts, mesh)
    if settings.replicas > 1:
        shape = (settings.replicas, world // settings.replicas)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    dtype = torch.bfloat16 if precision == "bf16" else None
    ignored = {p for p in model.parameters() if isinstance(p, DTensor)} | _replicate(model, dtype, device)
    terms: dict[str, Any] = {
        "mesh": mesh,
        # Inputs are cast by hand where they must be: angles of positions and weights of rows are fp32.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy() if settings.offload and device.type == "cuda" else OffloadPolicy(),
        "ignored_params": ignored,
    }
    for block in blocks(model):
        if any(parameter not in ignored for parameter in block.parameters()):
            _to_master(block, ignored)
            fully_shard(block, reshard_after_forward=settings.shard == "zero3", **terms)
    _to_master(model, ignored)
    fully_shard(model, reshard_after_forward=False, **terms)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer is not None and buffer.device != device:
                setattr(module, name, buffer.to(device))
    for sharded in (module for module in model.modules() if isinstance(module, FSDPModule)):
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    model.run_inside = types.MethodType(_run, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_inside")


def _run(model: SailVLForConditionalGeneration, function: Callable[..., T], *args: Any) -> T:
    return function(model, *args)


def _replicate(
    model: SailVLForConditionalGeneration, dtype: torch.dtype | None, device: torch.device
) -> set[nn.Parameter]:
    """Move the frozen parameters that every process keeps whole to ``device``, in the dtype of the arithmetic."""
    frozen = [p for p in model.parameters() if not p.requires_grad and not isinstance(p, DTensor)]
    size = sum(p.numel() * (dtype or p.dtype).itemsize for p in frozen)
    if size > MAX_REPLICATED or (dtype is not None and not all(_is_exact(p, dtype) for p in frozen)):
        return set()
    for parameter in frozen:
        parameter.data = parameter.data.to(device=device, dtype=dtype)
    return set(frozen)


def _is_exact(parameter: nn.Parameter, dtype: torch.dtype) -> bool:
    return bool(torch.equal(parameter.data, parameter.data.to(dtype).to(parameter.dtype)))


def _to_master(module: nn.Module, ignored: set[nn.Parameter]) -> None:
    """fp32 for what will be sharded: small updates of weights in half precision would be lost."""
    for parameter in module.parameters():
        if parameter not in ignored and parameter.dtype.itemsize == 2 and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()


def _experts(model: nn.Module) -> list[Any]:
    return [block.experts for block in sparse_layers(model).values()]


def _lm_blocks(model: SailVLForConditionalGeneration) -> Sequence[nn.Module]:
    return list(model.model.language_model.layers)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
