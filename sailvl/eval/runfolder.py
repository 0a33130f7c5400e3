"""Read a run folder, whatever is in it by now, into plain values for the report.

A report is written while a run is going on, after a crash, and of runs without evaluation, so nothing here is an
error: a file that is absent or unreadable is named in ``missing``, and the rest is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sailvl import log
from sailvl.eval.curves import Curve
from sailvl.eval.evaluate import Scores, tally
from sailvl.eval.metrics import paired_change


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage as planned (``spec``) and as run. ``answers`` by question id; ``scores`` None before its evaluation."""

    number: int
    name: str
    spec: Mapping[str, Any]
    folder: Path | None
    done: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    answers: Mapping[str, Mapping[str, Any]]
    scores: Scores | None

    @property
    def parents(self) -> tuple[str, ...]:
        """Names of the stages this one starts from."""
        return tuple(self.spec.get("of", ())) or tuple(filter(None, (self.spec.get("init"),)))

    @property
    def seconds(self) -> float:
        """Time of the stage so far, without its evaluation."""
        return float(self.done.get("seconds") or _total(self.metrics, "seconds"))

    def total(self, key: str) -> int:
        """``samples``, ``tokens`` or another count of the whole stage."""
        return int(self.done.get(key) or _total(self.metrics, key))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder's contents; ``missing`` says in words what is not there."""

    name: str
    path: Path
    spec: Mapping[str, Any]
    stages: tuple[Stage, ...]
    missing: tuple[str, ...] = field(default=())


def read(path: Path) -> Run:
    """Everything the report shows of the run folder ``path``."""
    missing: list[str] = []
    spec = _json(path / "curriculum.json") or {}
    if not spec:
        missing.append("curriculum.json is absent or unreadable: what was planned is not known")
    folders = sorted(folder for folder in path.glob("stages/*-*") if folder.is_dir())
    planned = spec.get("stages") or [{"name": folder.name.split("-", 1)[1].rpartition("-")[0]} for folder in folders]
    stages = []
    for number, stage in enumerate(planned, 1):
        own = [folder for folder in folders if _stage_name(folder) == stage["name"]]
        latest = max(own, key=lambda folder: folder.stat().st_mtime, default=None)
        stages.append(_stage(number, stage, latest, missing))
    if waiting := [f"{stage.number} {stage.name}" for stage in stages if stage.folder is None]:
        missing.append(f"not started: {', '.join(waiting)}")
    if stages and not any(stage.scores for stage in stages):
        missing.append("no stage has been evaluated: there are no scores and no answers to show")
    return Run(
        name=str(spec.get("name") or path.name), path=path, spec=spec, stages=tuple(stages), missing=tuple(missing)
    )


def _stage_name(folder: Path) -> str:
    """``NN-name-hash8`` -> name."""
    return folder.name.split("-", 1)[1].rpartition("-")[0]


def _stage(number: int, spec: Mapping[str, Any], folder: Path | None, missing: list[str]) -> Stage:
    name = str(spec["name"])
    if folder is None:
        return Stage(number=number, name=name, spec=spec, folder=None, done={}, metrics=(), answers={}, scores=None)
    done = _json(folder / "done.json") or {}
    if not done:
        missing.append(f"stage {number}, {name}, is not finished")
    metrics = [row for row in log.read(folder / "metrics.jsonl") if isinstance(row.get("step"), int)]
    answers = {row["id"]: row for row in log.read(folder / "eval" / "answers.jsonl") if "id" in row}
    finished = (folder / "eval" / "scores.json").exists()
    if answers and not finished:
        missing.append(f"stage {number}, {name}: its evaluation stopped after {len(answers)} answers")
    scores = tally(answers.values()) if answers and finished else None
    return Stage(
        number=number, name=name, spec=spec, folder=folder, done=done, metrics=metrics, answers=answers, scores=scores
    )


def changes(stage: Stage, run: Run) -> dict[str, tuple[float, float]]:
    """By family, and "" for all: change of accuracy against the stages it starts from, and half its 95 % interval.

    Questions are paired; a stage with several parents is set against the mean of their scores. {} if not comparable.
    """
    parents = [other for other in run.stages if other.name in stage.parents]
    if not parents or not stage.scores or not all(other.scores for other in parents):
        return {}
    if any(other.answers.keys() != stage.answers.keys() for other in parents):
        return {}
    before: dict[str, list[float]] = {}
    after: dict[str, list[float]] = {}
    for name, row in stage.answers.items():
        mean = sum(other.answers[name]["score"] for other in parents) / len(parents)
        for key in (row["family"], ""):
            before.setdefault(key, []).append(mean)
            after.setdefault(key, []).append(row["score"])
    return {key: paired_change(before[key], after[key]) for key in before}


def curve(stage: Stage) -> Curve | None:
    """What the training chart shows of a stage; None if it trains nothing (a soup) or has not started."""
    rows = stage.metrics
    if not rows:
        return None
    steps = max(int(stage.spec.get("steps") or 0) if not stage.done else 0, max(row["step"] for row in rows))
    return Curve(
        number=stage.number,
        name=stage.name,
        steps=max(steps, 1),
        loss=tuple((row["step"], row["loss"]) for row in rows if isinstance(row.get("loss"), int | float)),
        lr=tuple((row["step"], row["lr"]) for row in rows if isinstance(row.get("lr"), int | float)),
        marks=tuple(marks(rows)),
        trains=tuple(stage.spec.get("trains", ())),
    )


def marks(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """What AdaLRS did: a trial begins with the event "snapshot" and ends with "rollback", or when its phase ends.

    The log says when a trial ends, not whether its raise was kept: the multiplier tells.
    """
    found: list[tuple[float, str]] = []
    before: float | None = None
    for row in rows:
        event, scale = row.get("event"), float(row.get("scale") or 1.0)
        if before is not None and event != "rollback" and row.get("phase") == "base":
            found.append((row["step"], "kept" if scale > before * 1.000001 else "undecided"))
            before = None
        if event == "snapshot":
            found.append((row["step"], "snapshot"))
            before = scale
        elif event == "rollback":
            found.append((row["step"], "rollback"))
            before = None
    return found


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _total(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(row[key] for row in rows if isinstance(row.get(key), int | float)))
