"""The state of a stage without a loop: made, moved by made-up gradients, and told by digests of all it holds."""

import hashlib

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sailvl import dist
from sailvl.data.loader import Loader
from sailvl.model import checkpoint as model_checkpoint
from sailvl.train import ema, optim, schedule
from sailvl.train.shards import named_parameters, named_weights, whole
from sailvl.train.state import TrainState, optimizer_tensors


def make(assets, stage, processor, sources, *, dtype=torch.float64, replicas=1):
    """A fresh state on as many processes as there are; ``replicas`` of them hold the same shards."""
    model = model_checkpoint.load(assets / "model", dtype=dtype)
    optim.freeze(model, stage.trains)
    model.train()
    if dist.world_size() > 1:
        shard(model, replicas)
    loader = Loader(
        sources, stage.data.shares, processor, max_tokens=stage.max_tokens, max_tiles=stage.max_tiles,
        lanes=stage.lanes, seed=stage.seed, rank=dist.rank(), world_size=dist.world_size(),
    )  # fmt: skip
    return TrainState(
        model=model,
        optimizer=optim.build(model, stage),
        schedule=schedule.build(stage.schedule, stage.steps),
        loader=loader,
        precision="fp32",
        ema=ema.start(model, stage.ema) if stage.ema else None,
    )


def shard(model, replicas=1):
    world = dist.world_size()
    shape = (world,) if replicas == 1 else (replicas, world // replicas)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("shard",) if replicas == 1 else ("replicate", "shard"))
    for block in [*model.model.vision_tower.trunk.blocks, *model.model.language_model.layers]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def move(state, steps=1):
    """Optimizer steps with gradients that depend on the weights alone, by element."""
    for _ in range(steps):
        for _, parameter in named_parameters(state.model):
            if parameter.requires_grad:
                parameter.grad = parameter.detach() * 0.5 + 0.25
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if state.ema is not None:
            ema.update(state.ema, state.model)


def digests(state):
    """Of every weight, optimizer tensor and average, whole; the average is put in the weights' place to be seen."""
    found = {name: _digest(whole(tensor)) for name, tensor in named_weights(state.model).items()}
    found |= {name: _digest(whole(tensor)) for name, tensor in optimizer_tensors(state).items()}
    if state.ema is not None:
        found["updates"] = state.ema.updates
        with ema.swapped(state.ema, state.model):
            found |= {f"ema.{name}": _digest(whole(p)) for name, p in named_parameters(state.model)}
    return found


def _digest(tensor):
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(repr((tensor.dtype, tuple(tensor.shape))).encode() + data).hexdigest()
