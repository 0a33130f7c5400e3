"""From predictions to a figure one may quote: cleaned answers, a score, its interval, and what speaks against it.

Scoring always goes through a prediction file in VLMEvalKit's layout, also for answers this process just collected: our
figure and the toolkit's are then made of the same bytes. A result says how many answers no rule or judge could read
(they count as wrong, and are never guessed), how many rows failed, and by which rules it was made.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sailvl.eval import scoring
from sailvl.eval.predict import Asking, answer_key, current
from sailvl.eval.scoring import Judge, Scored, Verdict
from sailvl.eval.scoring.base import Context
from sailvl.eval.suite import Benchmark, printed, printed_score
from sailvl.eval.table import Row, Table, TableError, read_predictions, write_tsv
from sailvl.files import write_text
from sailvl.verify.cleanup import sail_answer, split_think

HALVES = 200
"""Half samples that an interval is made of."""

NO_MEAN = ("mme", "hallusion", "pope", "dynamath", "crpe", "wemath")
"""Rules whose score is no mean over rows, also where it happens to equal one: several rows count together, or F1."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One scored data set; figures in percent, except those that a set counts itself.

    ``low`` and ``high`` bound the 95 % interval (None where the score is no average over independent parts).
    ``mode``: "published" repeats the rules behind published scores, faults included; "strict" repairs those and is
    comparable with nothing. ``n`` counts answers, or groups that count together; ``unresolved`` those nobody could
    read; ``missing`` rows without any answer; ``failures`` the reasons by index. ``printed``: the report's figures by
    model.
    """

    data: str
    benchmark: str
    metric: str
    mode: str
    score: float
    low: float | None
    high: float | None
    scores: dict[str, float]
    n: int
    unresolved: int
    missing: int
    judge: str | None
    failures: dict[str, str] = field(default_factory=dict)
    printed: dict[str, float] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)


def export(table: Table, asking: Asking, predictions: Path, out: Path, *, model: str) -> dict[str, str]:
    """Write the answers as the toolkit writes them: every column but the picture, and ``prediction``.

    The thought of a thinking model goes to a column of its own. Gives the failures by index.
    """
    keys = [answer_key(table, number, asking, model) for number in range(len(table.rows))]
    found = {row["index"]: row for row in current(predictions, table, keys)}
    rows: list[dict[str, Any]] = []
    for row in table.rows:
        answer = found.get(str(row["index"]), {})
        raw = answer.get("raw", "")
        cleaned = sail_answer(raw, table.name, thinking=asking.thinking)
        thought = {"thinking": split_think(raw)[1]} if asking.thinking else {}
        rows.append({**row, "prediction": cleaned, **thought})
    write_tsv(out, rows, [*table.columns, "prediction", *(["thinking"] if asking.thinking else [])])
    return {index: row["error"] for index, row in found.items() if row.get("error")}


def score_file(
    path: Path,
    benchmark: Benchmark,
    *,
    table: Table | None = None,
    judge: Judge | None = None,
    judge_name: str | None = None,
    strict: bool = False,
    workers: int = 16,
    data: str = "",
) -> tuple[Result, list[Verdict], list[Row]]:
    """Score a prediction file. ``table`` supplies the columns that the file lacks, by index.

    Raises TableError if the file has other rows than the table, or lacks a column that the metric needs.
    """
    rows = read_predictions(path, plain=strict)
    if table is not None:
        rows = _joined(rows, table, path)
    try:
        scored = scoring.score(benchmark.metric, rows, judge=judge, strict=strict, workers=workers)
    except (KeyError, ValueError) as error:
        raise TableError(f"{path}: cannot be scored as {benchmark.name} ({error})") from error
    low, high = interval(benchmark.metric, rows, scored, strict=strict)
    models = sorted({model for model, _ in printed()})
    figures = {model: printed_score(model, benchmark) for model in models if model.startswith("SAIL-VL2")}
    result = Result(
        data=data or path.stem,
        benchmark=benchmark.name,
        metric=benchmark.metric,
        mode="strict" if strict else "published",
        score=scored.main,
        low=low,
        high=high,
        scores=scored.scores,
        n=scored.n,
        unresolved=scored.unresolved,
        missing=sum(row.get("prediction") is None for row in rows),
        judge=judge_name,
        printed={model: figure for model, figure in figures.items() if figure is not None},
    )
    return result, scored.verdicts, rows


def _joined(rows: Sequence[Row], table: Table, path: Path) -> list[Row]:
    """The predictions in the table's order, with its columns where they have none."""
    by_index = {str(row["index"]): row for row in rows}
    if len(by_index) < len(rows):
        raise TableError(f"{path}: an index is there twice")
    known = {str(row["index"]) for row in table.rows}
    foreign = [index for index in by_index if index not in known]
    if foreign:
        raise TableError(f"{path}: {len(foreign)} rows are not in {table.path}, first index {foreign[0]}")
    return [{"prediction": None, **row, **by_index.get(str(row["index"]), {})} for row in table.rows]


def save(result: Result, verdicts: Sequence[Verdict], out: Path) -> None:
    """Write ``scores.json`` and ``verdicts.jsonl`` in the folder ``out``, each in one piece."""
    out.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(verdict), ensure_ascii=False, default=str) for verdict in verdicts)
    write_text(out / "verdicts.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(out / "scores.json", json.dumps(asdict(result), ensure_ascii=False, indent=1) + "\n")


def export_folder(out: Path, model: str) -> Path:
    """A new folder in the toolkit's layout, ``out/MODEL/TYYYYMMDD-HHMMSS``: it takes the newest."""
    return out / model / time.strftime("T%Y%m%d-%H%M%S")


# ---- intervals ------------------------------------------------------------------------------------------------


def interval(
    metric: str, rows: Sequence[Row], scored: Scored, *, strict: bool = False
) -> tuple[float | None, float | None]:
    """The 95 % interval of a score, in percent; (None, None) where it is no average over independent parts.

    Means of right and wrong: Wilson's interval (J. Am. Stat. Assoc. 22, 1927). Means of degrees: the normal one. Sums
    and averages over groups of rows: from half samples drawn without replacement, whose spread equals the standard
    error of the whole; rows that count together stay together.
    """
    values = [verdict.score for verdict in scored.verdicts]
    if not values:
        return None, None
    if metric not in NO_MEAN and abs(100 * math.fsum(values) / len(values) - scored.main) < 1e-6:
        return _of_mean(values)
    if metric == "ocrbench" and not strict:  # hits over ten, however many rows there are
        low, high = _of_mean(values)
        return low * len(values) / 1000, high * len(values) / 1000
    parts: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        parts.setdefault(_part(metric, row, number), []).append(number)
    if metric == "wemath" or len(scored.verdicts) != len(rows) or len(parts) < 8:
        return None, None
    total, context = scoring.METRICS[metric].total, Context(strict=strict)
    names, draw, figures = sorted(parts), random.Random(0), []
    for _ in range(HALVES):
        chosen = sorted(number for name in draw.sample(names, len(names) // 2) for number in parts[name])
        half = [rows[number] for number in chosen], [scored.verdicts[number] for number in chosen]
        figures.append(total(*half, context)[0])
    mean = math.fsum(figures) / HALVES
    error = math.sqrt(math.fsum((figure - mean) ** 2 for figure in figures) / (HALVES - 1))
    if not error:  # all right or all wrong: half samples cannot tell how far that goes
        return None, None
    return max(0.0, scored.main - 1.96 * error), min(100.0, scored.main + 1.96 * error)


def _of_mean(values: Sequence[float]) -> tuple[float, float]:
    n, mean, z = len(values), math.fsum(values) / len(values), 1.96
    if all(value in (0.0, 1.0) for value in values):
        centre, spread = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return 100 * max(0.0, (centre - spread) / (1 + z * z / n)), 100 * min(1.0, (centre + spread) / (1 + z * z / n))
    error = z * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(n - 1, 1) / n)
    return 100 * max(0.0, mean - error), 100 * min(1.0, mean + error)


def _part(metric: str, row: Mapping[str, Any], number: int) -> str:
    """What counts together with a row: an image's two questions, a figure's, four of CRPE, a problem's variants."""
    if metric == "mme":
        return f"{row.get('category')}/{row.get('image_path')}"
    if metric == "hallusion":
        return "/".join([str(row.get("l2-category")), *str(row["index"]).split("_")[3:5]])
    if metric == "dynamath":
        return str(row.get("qid"))
    return str(number // 4 if metric == "crpe" else number)
