"""Checkpoints that exist completely or not at all, written by any number of processes and read by any other.

A checkpoint is a folder ``step-000100``: model, optimizer, ema and (while AdaLRS tries a learning rate) snapshot, each
in one safetensors file per process (``shards.py``; all weights, frozen ones too); state.json (step, positions of all
lanes, schedule, random generators of all processes, totals, validation loss); and DONE, written last, with the size and
SHA-256 of every other file. It is made under a temporary name, forced to disk, then renamed by the first process once
all have written: whatever instant a process or a machine dies, a folder of that name is whole. Hashes catch what a
rename cannot (bad disks, partial copies); such a folder is passed over with a warning and the one before it is used.

Nothing is pickled, so a checkpoint from elsewhere cannot run code. All processes must see the same folder. Another
number of processes continues with the same bits of everything; of random generators a new process takes the first's.

Hashing costs a second per 2 GB. ``asynchronous`` stops training for a copy to the host alone: as much host memory as
this process's share of the checkpoint, used again by the next; then a thread writes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import distributed

from sailvl import dist
from sailvl.files import force_to_disk
from sailvl.model.checkpoint import CheckpointError
from sailvl.train.background import Task
from sailvl.train.export import export
from sailvl.train.folders import TEMPORARY, damage, fingerprint, folders, newest, put_in_place, step_of
from sailvl.train.resume import FORMAT, load, saved_precision
from sailvl.train.shards import Shard, file_name, named_weights
from sailvl.train.shards import shards as shards_of
from sailvl.train.shards import write as write_shards
from sailvl.train.state import TrainState, copied, optimizer_tensors, rng_state

__all__ = ["CheckpointError", "damage", "export", "finish", "load", "newest", "save", "saved_precision"]

T = TypeVar("T")
Parts = dict[str, dict[str, Shard]]
"""Kind of file (model, optimizer, ema, snapshot) -> tensor name -> what this process holds of it."""

KEEP = 2


def save(
    state: TrainState,
    folder: Path,
    *,
    identity: str,
    keep_last: int = KEEP,
    best: int = 0,
    asynchronous: bool = False,
) -> Path:
    """Write ``folder/step-NNNNNN``; delete older ones but the ``keep_last`` newest and the ``best`` of the lowest
    validation loss (those whose step was validated: ``state.held_out``). Returns the new folder.

    All processes must call it. ``asynchronous``: the folder appears later; the next call waits for it, and the end must
    (``finish``). Raises CheckpointError, in every process, when writing fails in one (a full disk, mostly), or failed
    in the background since; earlier checkpoints are then untouched.
    """
    finish(state)
    state.optimizer.zero_grad(set_to_none=True)
    path = folder / f"step-{state.step:06d}"
    values, parts = _state_values(state, identity), _parts(state)
    if not asynchronous:
        _write(path, values, parts, keep_last=keep_last, best=best, group=None)
        return path
    if state.group is None and dist.world_size() > 1:
        # The thread's messages must not meet those of training: a group of its own, on CPUs.
        state.group = distributed.new_group(backend="gloo")
    parts = {kind: held if kind == "snapshot" else _copied(kind, held, state.host) for kind, held in parts.items()}
    state.saving = Task(partial(_write, path, values, parts, keep_last=keep_last, best=best, group=state.group))
    return path


def finish(state: TrainState) -> None:
    """Wait for the checkpoint that is being written in the background, if any. Raises its CheckpointError."""
    task, state.saving = state.saving, None
    if task is not None:
        task.result()


def _parts(state: TrainState) -> Parts:
    model, optimizer = shards_of(named_weights(state.model)), shards_of(optimizer_tensors(state))
    parts = {"model": model, "optimizer": optimizer}
    if state.ema is not None:
        parts["ema"] = {name: replace(model[name], local=value) for name, value in state.ema.weights.items()}
    if state.snapshot is not None:
        averages = {} if state.snapshot.ema is None else state.snapshot.ema[0]
        kept = [("weights", model, state.snapshot.weights), ("optimizer", optimizer, state.snapshot.optimizer)]
        parts["snapshot"] = {
            f"{kind}.{name}": replace(live[name], local=value)
            for kind, live, tensors in [*kept, ("ema", model, averages)]
            for name, value in tensors.items()
        }
    return parts


def _copied(kind: str, held: dict[str, Shard], buffers: dict[str, torch.Tensor]) -> dict[str, Shard]:
    """What this process will write, on the host."""
    mine = {name: shard for name, shard in held.items() if shard.is_written}
    copies = copied({name: shard.local for name, shard in mine.items()}, buffers, f"saving.{kind}.")
    return {name: replace(shard, local=copies[name]) for name, shard in mine.items()}


def _state_values(state: TrainState, identity: str) -> dict[str, Any]:
    """What state.json holds, gathered from all processes."""
    snapshot = state.snapshot
    own = {"loader": state.loader.state_dict(), "rng": _to_hex(rng_state())}
    if snapshot is not None:
        own |= {"snapshot.loader": snapshot.loader, "snapshot.rng": _to_hex(snapshot.rng)}
    all_own = dist.gather(own)
    validated, loss = state.held_out or (None, None)
    return {
        "format": FORMAT,
        "processes": dist.world_size(),
        "step": state.step,
        "bad_steps": state.bad_steps,
        "identity": identity,
        "precision": state.precision,
        "loader": _with_all_lanes([each["loader"] for each in all_own]),
        "schedule": state.schedule.state_dict(),
        "totals": vars(state.totals),
        "rng": [each["rng"] for each in all_own],
        "ema_updates": None if state.ema is None else state.ema.updates,
        "expert_counts": _to_list(state.expert_counts),
        "validation_loss": loss if validated == state.step else None,
        "snapshot": None
        if snapshot is None
        else {
            "step": snapshot.step,
            "loader": _with_all_lanes([each["snapshot.loader"] for each in all_own]),
            "rng": [each["snapshot.rng"] for each in all_own],
            "ema_updates": None if snapshot.ema is None else snapshot.ema[1],
            "expert_counts": _to_list(snapshot.expert_counts),
        },
    }


def _with_all_lanes(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One process's state of the loader with the lanes of all."""
    lanes = {lane["lane"]: lane for state in states for lane in state["lanes"]}
    return {**states[0], "lanes": [lanes[number] for number in sorted(lanes)]}


def _write(path: Path, values: dict[str, Any], parts: Parts, *, keep_last: int, best: int, group: Any) -> None:
    """What every process does of a save, in the training thread or in its own; ``group`` is where messages go."""
    temporary, is_main = path.with_name(f"{TEMPORARY}new-{path.name}"), dist.is_main()

    def begin() -> None:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def fill() -> dict[str, list[int | str]]:
        written = [temporary / file_name(kind, dist.rank(), dist.world_size()) for kind in parts]
        for file, tensors in zip(written, parts.values(), strict=True):
            write_shards(file, tensors)
        if is_main:
            written.append(temporary / "state.json")
            written[-1].write_text(json.dumps(values))
        for file in written:
            force_to_disk(file)
        return {file.name: fingerprint(file) for file in written}

    def end() -> None:
        if is_main:
            missing = [name for name in files if not (temporary / name).is_file()]
            if missing:
                raise OSError(f"{missing[0]} of another process is not here: all processes need the same folder")
            (temporary / "DONE").write_text(json.dumps(files))
            force_to_disk(temporary / "DONE")
            force_to_disk(temporary)
            put_in_place(temporary, path)

    _together(begin, path, group)
    files = {name: found for each in _together(fill, path, group) for name, found in each.items()}
    _together(end, path, group)
    if is_main:
        _forget_others(path.parent, values["step"], keep_last, best)


def _together(work: Callable[[], T], path: Path, group: Any) -> list[T]:
    """Do it in every process; the results of all, or a CheckpointError in all if one of them failed."""
    result: T | None = None
    fault: Exception | None = None
    try:
        result = work()
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a failed write as RuntimeError, safetensors as its own error, everything else as OSError.
        fault = error
    told = [(result, None if fault is None else str(fault))]
    if dist.world_size() > 1:
        told *= dist.world_size()
        distributed.all_gather_object(told, told[0], group=group)
    faults = [f"process {rank}: {text}" for rank, (_, text) in enumerate(told) if text is not None]
    if faults:
        if dist.is_main():
            shutil.rmtree(path.with_name(f"{TEMPORARY}new-{path.name}"), ignore_errors=True)
        free = shutil.disk_usage(path.parent).free / 1e9 if path.parent.is_dir() else 0.0
        raise CheckpointError(
            f"cannot write checkpoint {path} ({free:.1f} GB free there): {'; '.join(faults)}. Earlier checkpoints are "
            "intact: make room and run the same command again to continue from the newest"
        ) from fault
    return [each for each, _ in told]  # type: ignore[misc]


def _forget_others(folder: Path, step: int, keep_last: int, best: int) -> None:
    """Keep the newest up to ``step`` and the best. Later ones failed their check, or training had begun there."""
    paths = folders(folder)
    earlier = [path for path in paths if step_of(path) <= step]
    losses = [(loss, -step_of(path), path) for path in earlier if (loss := _validation_loss(path)) is not None]
    kept = {*earlier[-max(1, keep_last) :], *(path for _, _, path in sorted(losses)[:best])}
    for path in paths:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _validation_loss(path: Path) -> float | None:
    try:
        loss = json.loads((path / "state.json").read_text())["validation_loss"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


def _to_hex(states: dict[str, list[torch.Tensor]]) -> dict[str, list[str]]:
    return {device: [bytes(state.tolist()).hex() for state in each] for device, each in states.items()}


def _to_list(counts: torch.Tensor | None) -> Any:
    return None if counts is None else counts.tolist()
