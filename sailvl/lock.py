"""One process at a time in a folder: a lock that a dead process cannot keep.

The owner is written down by host, process id and time of birth (ids are used again). An flock held for the whole run
would be simpler, but forked loader workers inherit it and would keep it after their parent was killed; here an flock
guards only the moments in which the file is read and written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class LockedError(RuntimeError):
    """The folder is in use by a live process."""


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold a folder for this process: LockedError while a live process holds it; a dead one's lock is taken over."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / ".lock"
    own = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
    with _guarded(path) as file:
        owner = _read_owner(file.read())
        if owner and _alive(owner):
            raise LockedError(
                f"{out}: process {owner['pid']} on {owner['host']} is running this folder; "
                f"stop it or choose another --out (if it is gone, delete {path})"
            )
        file.seek(0)
        file.truncate()
        json.dump(own, file)
    try:
        yield
    finally:
        with _guarded(path) as file:
            file.truncate()


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[Any]:
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
        file.flush()


def _read_owner(text: str) -> dict[str, Any] | None:
    try:
        owner = json.loads(text)
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and {"host", "pid", "born"} <= owner.keys() else None


def _alive(owner: Mapping[str, Any]) -> bool:
    if owner["host"] != socket.gethostname():
        return True  # cannot be told from here
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(_born(owner["pid"]) == owner["born"])


def _born(pid: int) -> str:
    """When a process started, in clock ticks: process ids are used again. Empty where /proc is missing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
