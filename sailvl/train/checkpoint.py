"""Checkpoints that exist completely or not at all.

A checkpoint is a folder ``step-000100``: model.safetensors (all weights, frozen ones too), optimizer.pt, state.json
(step, data cursor, schedule, random generators), snapshot.pt while AdaLRS tries a learning rate, and DONE, written
last, with the size and SHA-256 of every other file. It is made under a temporary name, forced to disk, then renamed:
whatever instant the process or the machine dies, a folder of that name is whole. Hashes catch what a rename cannot
(bad disks, partial copies); such a folder is passed over with a warning and the one before it is used.

The two newest are kept. Hashing costs about a second per 2 GB. ``.pt`` files are read with ``weights_only=True``, so
a checkpoint from elsewhere cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sailvl.model.checkpoint import CheckpointError
from sailvl.train.state import Counts, Snapshot, TrainState, rng_state, set_rng_state

KEEP = 2
TEMPORARY = ".unfinished-"
"""Begins the names of folders that were being written; they may be deleted whenever nothing writes."""


def save(state: TrainState, folder: Path, *, identity: str) -> Path:
    """Write ``folder/step-NNNNNN`` and delete older ones but the newest two. Returns the new folder.

    Raises CheckpointError when writing fails (a full disk, mostly); earlier checkpoints are then untouched.
    """
    path = folder / f"step-{state.step:06d}"
    try:
        with atomic_folder(path) as temporary:
            save_file(_weights(state), temporary / "model.safetensors")
            torch.save(state.optimizer.state_dict(), temporary / "optimizer.pt")
            if state.snapshot is not None:
                torch.save(vars(state.snapshot), temporary / "snapshot.pt")
            (temporary / "state.json").write_text(json.dumps(_state_values(state, identity)))
            files = {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())}
            (temporary / "DONE").write_text(json.dumps(files))
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a failed write as RuntimeError, safetensors as its own error, everything else as OSError.
        free = shutil.disk_usage(folder).free / 1e9
        raise CheckpointError(
            f"cannot write checkpoint {path} ({free:.1f} GB free there): {error}. Earlier checkpoints are intact: "
            "make room and run the same command again to continue from the newest"
        ) from error
    _forget_others(folder, state.step)
    return path


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None; warns about each damaged one it passes over."""
    for path in sorted(folder.glob("step-*"), key=_step, reverse=True):
        fault = damage(path)
        if fault is None:
            return path
        warnings.warn(f"checkpoint {path} is passed over: {fault}", stacklevel=2)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file is as it was written."""
    try:
        files = json.loads((path / "DONE").read_text())
        for name, expected in files.items():
            if _fingerprint(path / name) != expected:
                return f"{name} does not have the size and hash written in DONE"
    except (OSError, ValueError) as error:
        return f"unreadable ({error})"
    return None


def load(state: TrainState, path: Path, *, identity: str) -> None:
    """Continue from ``path``: fills model, optimizer, schedule, loader, generators, step and totals in place.

    Raises CheckpointError when the checkpoint belongs to another stage or another model.
    """
    values = json.loads((path / "state.json").read_text())
    if values["identity"] != identity:
        raise CheckpointError(
            f"{path} was made by a stage with other settings: train into another folder, or delete {path.parent}"
        )
    weights, parameters = load_file(path / "model.safetensors"), _weights(state)
    if weights.keys() != parameters.keys():
        raise CheckpointError(f"{path} is of another model; keys differ: {sorted(weights.keys() ^ parameters.keys())}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    state.optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True))
    if (path / "snapshot.pt").exists():
        state.snapshot = Snapshot(**torch.load(path / "snapshot.pt", weights_only=True))
    state.schedule.load_state_dict(values["schedule"])
    state.loader.load_state_dict(values["loader"])
    set_rng_state({device: [_from_hex(text) for text in texts] for device, texts in values["rng"].items()})
    state.precision, state.step, state.totals = values["precision"], values["step"], Counts(**values["totals"])


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well and vanishes when it does not.

    A folder already at ``path`` is replaced. Everything is forced to disk before the rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = (path.with_name(f"{TEMPORARY}{kind}-{path.name}") for kind in ("new", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _force_to_disk(file)
        _force_to_disk(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    temporary.rename(path)
    _force_to_disk(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _weights(state: TrainState) -> dict[str, torch.Tensor]:
    """Every stored tensor once: a tied head shares its memory with the embedding and is left out."""
    stored: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in state.model.state_dict().items():
        stored.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(stored.values())


def _state_values(state: TrainState, identity: str) -> dict[str, Any]:
    return {
        "step": state.step,
        "identity": identity,
        "precision": state.precision,
        "loader": state.loader.state_dict(),
        "schedule": state.schedule.state_dict(),
        "totals": vars(state.totals),
        "rng": {device: [bytes(s.tolist()).hex() for s in states] for device, states in rng_state().items()},
    }


def _forget_others(folder: Path, step: int) -> None:
    """Keep the two newest up to ``step``. Later ones failed their check, or training would have begun there."""
    paths = sorted(folder.glob("step-*"), key=_step)
    kept = [path for path in paths if _step(path) <= step][-KEEP:]
    for path in paths:
        if path not in kept:
            shutil.rmtree(path)
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _fingerprint(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
