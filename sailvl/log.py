"""Metrics on disk: one JSON object per line, appended as training goes.

Why lines: a line is readable by anything, appending never rewrites what is already there, and a run that dies while
writing damages at most its last line, which readers drop. Each line is flushed to the system at once (it survives
``kill -9`` of the process) and forced to disk on close (an fsync per line would cost more than a small step).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class MetricsLog:
    """Append-only JSON lines at ``path``; its folder is created. Use as a context manager or call ``close``."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a", encoding="utf-8")
        if self._file.tell() and not _ends_with_newline(path):
            # A torn last line would swallow the next one: end it, and readers skip it as unreadable.
            self._file.write("\n")

    def write(self, **values: Any) -> None:
        """Append one line. Values are JSON-able; NaN and infinity become null, which every JSON reader accepts."""
        self._file.write(json.dumps({key: _finite(value) for key, value in values.items()}, ensure_ascii=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drop every line whose ``step`` is past ``step`` (a resumed run writes them again). Atomic."""
        kept = [row for row in read(self.path) if row.get("step", 0) <= step]
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        self._file.close()
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Force everything to disk and close; closing twice is harmless."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics file, oldest first; lines torn by a killed writer are left out. [] if there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _finite(value: Any) -> Any:
    is_lost = isinstance(value, float) and (value != value or value in (float("inf"), float("-inf")))
    return None if is_lost else value


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
