"""Reading a checkpoint back into live objects, on any number of processes, whatever number wrote it (``shards.py``).

Each process reads the parts of tensors that it holds, straight into them, one at a time.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from sailvl import dist
from sailvl.model.checkpoint import CheckpointError
from sailvl.train import optim
from sailvl.train.shards import Reader, Shard, local, named_parameters, named_weights, reading, reshard, shards
from sailvl.train.state import Counts, Snapshot, TrainState, optimizer_tensors, set_rng_state

FORMAT = 2
"""1 was model.safetensors, optimizer.pt (pickled) and snapshot.pt, of one process; it is not read any more."""


def load(state: TrainState, path: Path, *, identity: str) -> None:
    """Continue from ``path``: fills model, optimizer, average, schedule, loader, generators, step and totals in place.

    Raises CheckpointError when the checkpoint belongs to another stage, another model, or another format.
    """
    values = _values(path)
    if values["identity"] != identity:
        raise CheckpointError(
            f"{path} was made by a stage with other settings: train into another folder, or delete {path.parent}"
        )
    load_weights(state.model, path)
    processes = values["processes"]
    with reading(path, "optimizer", processes) as reader:
        _load_optimizer(state, reader)
    if state.ema is not None:
        if values["ema_updates"] is None:
            raise CheckpointError(f"{path} has no average of the weights, and this stage keeps one")
        held = _trained(state)
        with reading(path, "ema", processes) as reader:
            for name, average in state.ema.weights.items():
                average.copy_(reader.read(name, held[name].offsets, average.shape))
        state.ema.updates = values["ema_updates"]
    state.expert_counts = _counts(state, values["expert_counts"])
    state.snapshot = None
    if values["snapshot"] is not None:
        with reading(path, "snapshot", processes) as reader:
            state.snapshot = _snapshot(state, values["snapshot"], reader)
    state.schedule.load_state_dict(values["schedule"])
    state.loader.load_state_dict(values["loader"])
    set_rng_state(_own(values["rng"]))
    if processes < dist.world_size() and dist.is_main():
        warnings.warn(
            f"{path} was written by {processes} processes and there are {dist.world_size()}: the random generators of "
            "the new ones begin like that of the first",
            stacklevel=2,
        )
    state.precision, state.step, state.totals = values["precision"], values["step"], Counts(**values["totals"])
    state.bad_steps = values["bad_steps"]
    state.held_out = None if values["validation_loss"] is None else (state.step, values["validation_loss"])


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Only the weights of a checkpoint, in place. Raises CheckpointError when they are not this model's."""
    weights = named_weights(model)
    with reading(path, "model", _values(path)["processes"]) as reader, torch.no_grad():
        if weights.keys() != reader.shapes.keys():
            odd = sorted(weights.keys() ^ reader.shapes.keys())
            raise CheckpointError(f"{path} is of another model; keys differ: {odd}")
        for name, tensor in weights.items():
            local(tensor).copy_(reader.read_like(name, tensor))
    reshard(model)


def saved_precision(path: Path) -> str:
    """What "auto" meant when a checkpoint was written: weights are shared and cast before it is loaded.

    Raises CheckpointError for an earlier format.
    """
    return str(_values(path)["precision"])


def _values(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / "state.json").read_text())
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has an earlier format (optimizer.pt), which is not read because it is pickled: finish the stage "
            f"with the version of sailvl that began it, or delete {path.parent} to begin the stage anew"
        )
    return values


def _load_optimizer(state: TrainState, reader: Reader) -> None:
    names = {parameter: name for name, parameter in named_parameters(state.model)}
    stored: dict[str, list[str]] = {}
    for entry in reader.shapes:
        key, name = entry.split(".", 1)
        stored.setdefault(name, []).append(key)
    trained = {names[parameter]: parameter for parameter in optim.parameters(state.optimizer)}
    if odd := sorted(stored.keys() - trained.keys()):
        raise CheckpointError(f"the checkpoint has an optimizer's state of {odd[0]}, which is not trained here")
    state.optimizer.state.clear()
    for name, parameter in trained.items():
        for key in stored.get(name, []):
            entry = f"{key}.{name}"
            if reader.shapes[entry] == () != tuple(parameter.shape):  # a count of steps
                value = reader.read(entry, (), ()).to(parameter.device)
            else:
                value = torch.empty_like(parameter, dtype=reader.dtypes[entry])
                local(value).copy_(reader.read_like(entry, value))
            state.optimizer.state[parameter][key] = value


def _snapshot(state: TrainState, values: dict[str, Any], reader: Reader) -> Snapshot:
    """What this process holds of the snapshot. The optimizer must have been loaded: its tensors say how it is cut."""
    weights, live = _trained(state), shards(optimizer_tensors(state))
    kinds: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "optimizer": {}, "ema": {}}
    for entry in reader.shapes:
        kind, name = entry.split(".", 1)
        shard = (live if kind == "optimizer" else weights)[name]
        kinds[kind][name] = reader.read(entry, shard.offsets, shard.local.shape)
    return Snapshot(
        step=values["step"],
        weights=kinds["weights"],
        optimizer=kinds["optimizer"],
        rng=_own(values["rng"]),
        loader=values["loader"],
        ema=None if values["ema_updates"] is None else (kinds["ema"], values["ema_updates"]),
        expert_counts=_counts(state, values["expert_counts"]),
    )


def _trained(state: TrainState) -> dict[str, Shard]:
    return shards({name: p for name, p in named_parameters(state.model) if p.requires_grad})


def _counts(state: TrainState, values: Any) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int64, device=state.model.device)


def _own(rng: list[dict[str, list[str]]]) -> dict[str, list[torch.Tensor]]:
    """This process's generators, or the first's if it is new."""
    mine = rng[dist.rank()] if dist.rank() < len(rng) else rng[0]
    return {device: [_from_hex(text) for text in texts] for device, texts in mine.items()}


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
