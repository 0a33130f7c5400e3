"""Files that are whole or not there, and what a kill leaves of those that grow."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def writing(path: Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """A file that takes the place of ``path`` when the block ends well, forced to disk, and vanishes if it does not.

    Text is UTF-8 unless ``options`` (those of ``open``) say otherwise. The folder is made. Several processes may write
    the same file: the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    try:
        with draft.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a whole text or nothing; what is no character is written as its code."""
    with writing(path, errors="backslashreplace") as file:
        file.write(text)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that grows line by line, after cutting off a last one that was never finished.

    [] if there is no file.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.splitlines()


def force_to_disk(path: Path) -> None:
    """Return when a file or folder would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(fresh: Path, target: Path, aside: Path) -> None:
    """Rename ``fresh`` to ``target``; an earlier folder steps ``aside`` first, as folders cannot be renamed over."""
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    fresh.rename(target)
    force_to_disk(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
