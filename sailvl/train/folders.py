"""Folders that are whole or not there, and the newest whole one of several."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sailvl import dist
from sailvl.files import force_to_disk, replace_folder

TEMPORARY = ".unfinished-"
"""Begins the names of folders that were being written; they may be deleted whenever nothing writes."""


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None; warns about each damaged one it passes over.

    All processes must call it and get the same answer: the first lists the folder, each checks its share of the files.
    """
    for name in dist.broadcast([path.name for path in reversed(folders(folder))]):
        path = folder / name
        found = dist.gather(damage(path, share=(dist.rank(), dist.world_size())))
        fault = next((each for each in found if each is not None), None)
        if fault is None:
            return path
        if dist.is_main():
            warnings.warn(f"checkpoint {path} is passed over: {fault}", stacklevel=2)
    return None


def damage(path: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file is as it was written.

    ``share`` (i, n): of all files only every n-th is read, from the i-th on.
    """
    try:
        files = json.loads((path / "DONE").read_text())
        present = {file.name for file in path.iterdir()} - {"DONE"}
        if present != set(files):
            return f"its files are not those named in DONE: {', '.join(sorted(present ^ set(files)))}"
        for name in sorted(files)[share[0] :: share[1]]:
            if fingerprint(path / name) != files[name]:
                return f"{name} does not have the size and hash written in DONE"
    except (OSError, ValueError, TypeError) as error:
        return f"unreadable ({error})"
    return None


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well and vanishes when it does not.

    A folder already at ``path`` is replaced. Everything is forced to disk before the rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}new-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            force_to_disk(file)
        force_to_disk(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    put_in_place(temporary, path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename; a folder already there steps aside first."""
    replace_folder(temporary, path, path.with_name(f"{TEMPORARY}old-{path.name}"))


def folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, oldest first."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def step_of(path: Path) -> int:
    """100 of ``step-000100``."""
    return int(path.name.removeprefix("step-"))


def fingerprint(path: Path) -> list[int | str]:
    """Size in bytes and SHA-256."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
