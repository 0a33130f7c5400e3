"""Metrics on disk: one JSON object per line, appended as training goes.

Why lines: a line is readable by anything, appending never rewrites what is already there, and a run that dies while
writing damages at most its last line, which readers drop. Each line is flushed to the system at once (it survives
``kill -9`` of the process) and forced to disk on close (an fsync per line would cost more than a small step).

The file is the truth; experiment trackers are mirrors of its numbers, for those who want them (``tracking``). A
tracker that fails is left out with one warning, and training goes on. A step is mirrored once: a resumed run repeats
steps with the same numbers, so what was sent before is not sent again (``NAME.step`` beside the file says how far).
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from sailvl.files import write_text, writing


class MetricsLog:
    """Append-only JSON lines at ``path``; its folder is created. Use as a context manager or call ``close``."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._mirrors = [_Mirror(name, path) for name in _chosen.get()] if path.name == "metrics.jsonl" else []
        self._file = path.open("a", encoding="utf-8")
        if self._file.tell() and not _ends_with_newline(path):
            # A torn last line would swallow the next one: end it, and readers skip it as unreadable.
            self._file.write("\n")

    def write(self, **values: Any) -> None:
        """Append one line. Values are JSON-able; NaN and infinity become null, which every JSON reader accepts."""
        self._file.write(json.dumps({key: _finite(value) for key, value in values.items()}, ensure_ascii=False) + "\n")
        self._file.flush()
        for mirror in self._mirrors:
            mirror.write(values)

    def truncate_after(self, step: int) -> None:
        """Drop every line whose ``step`` is past ``step`` (a resumed run writes them again). Atomic."""
        kept = [row for row in read(self.path) if row.get("step", 0) <= step]
        with writing(self.path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        self._file.close()
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Force everything to disk and close, mirrors too; closing twice is harmless."""
        for mirror in self._mirrors:
            mirror.close()
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


# ---- trackers -------------------------------------------------------------------------------------------------------


class TrackerError(ValueError):
    """A tracker that is unknown, or whose package is not installed."""


class Tracker(Protocol):
    """What a tracker must do."""

    def log(self, values: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    """Event files in ``tensorboard/`` beside the metrics."""

    def __init__(self, path: Path) -> None:
        self._writer = _load("tensorboard", "torch.utils.tensorboard").SummaryWriter(str(path.parent / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Runs:
    """wandb, and trackio, which speaks its language: the run's folder is the project, the stage's is the run."""

    def __init__(self, path: Path, module: str) -> None:
        stage, project = path.parent, path.parents[2]  # PROJECT/stages/STAGE/metrics.jsonl
        self._module = _load(module)
        self._module.init(project=project.name or "sailvl", name=stage.name, resume="allow", **self._identity(stage))

    def _identity(self, stage: Path) -> dict[str, str]:
        return {}

    def log(self, values: dict[str, float], step: int) -> None:
        self._module.log(values, step=step)

    def close(self) -> None:
        self._module.finish()


class _Wandb(_Runs):
    def __init__(self, path: Path) -> None:
        super().__init__(path, "wandb")

    def _identity(self, stage: Path) -> dict[str, str]:
        """The same run after a resumption: an id that is kept beside the metrics."""
        file = stage / "wandb.id"
        if not file.exists():
            write_text(file, os.urandom(8).hex())
        return {"id": file.read_text(encoding="utf-8"), "dir": str(stage)}


class _Trackio(_Runs):
    def __init__(self, path: Path) -> None:
        super().__init__(path, "trackio")


TRACKERS: dict[str, Callable[[Path], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
"""Name, which is also the package to install, to what makes one for a metrics file."""

_chosen: ContextVar[tuple[str, ...]] = ContextVar("trackers", default=())


@contextmanager
def tracking(names: Sequence[str]) -> Iterator[None]:
    """Within the block, whatever is written to a file called ``metrics.jsonl`` goes to the trackers ``names`` too.

    Raises TrackerError for an unknown name, or a tracker that is not installed, naming the package.
    """
    for name in names:
        if name not in TRACKERS:
            raise TrackerError(f"unknown tracker '{name}'; trackers: {', '.join(TRACKERS)}")
        _load(name)
    token = _chosen.set(tuple(dict.fromkeys(names)))
    try:
        yield
    finally:
        _chosen.reset(token)


def _load(package: str, module: str = "") -> Any:
    try:
        return importlib.import_module(module or package)
    except ImportError as error:
        raise TrackerError(f"the tracker {package} cannot be imported ({error}): pip install {package}") from error


class _Mirror:
    """One tracker of one metrics file: opened with the first row, given up at the first failure."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self._tracker: Tracker | None = None
        self._is_lost = False
        self._mark = path.with_name(f"{name}.step")

    def write(self, values: dict[str, Any]) -> None:
        step = values.get("step")
        numbers = {key: float(value) for key, value in values.items() if _is_number(value) and key != "step"}
        if self._is_lost or not isinstance(step, int):
            return
        try:
            if step <= (int(self._mark.read_text()) if self._mark.exists() else 0):
                return
            write_text(self._mark, str(step))  # before: after a crash a row is missing rather than there twice
            if self._tracker is None:
                self._tracker = TRACKERS[self.name](self.path)
            self._tracker.log(numbers, step)
        except Exception as error:  # noqa: BLE001 - whatever a service does, training is worth more
            self._give_up(error)

    def close(self) -> None:
        tracker, self._tracker = self._tracker, None
        try:
            if tracker is not None:
                tracker.close()
        except Exception as error:  # noqa: BLE001 - whatever a service does, training is worth more
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._is_lost, self._tracker = True, None
        text = f"the tracker {self.name} failed and gets no more rows ({type(error).__name__}: {error})"
        warnings.warn(f"{text}; training goes on, and {self.path} has them all", stacklevel=3)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and _finite(value) is not None
