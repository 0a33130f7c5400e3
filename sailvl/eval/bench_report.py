"""One HTML page for a model's evaluation: our score with its interval beside the report's figure, and answers to check.

Made from the folders that ``eval.bench`` leaves, so it can be made again at any time, also in the middle of a long
evaluation. Like the run report it is one file without scripts or outside resources.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from sailvl.eval import charts
from sailvl.eval.report import HERE, duration
from sailvl.eval.suite import OPENCOMPASS, SUITE, count_of, printed
from sailvl.files import write_text

MODELS = ("SAIL-VL2-2B", "SAIL-VL2-AnyRes-2B", "SAIL-VL2-8B", "SAIL-VL2-A3B")
THINKING = ("SAIL-VL2-2B-Thinking", "SAIL-VL2-8B-Thinking", "SAIL-VL2-A3B-Thinking")
SMALL = 280
"""Pictures of at most this many pixels are shown at twice their size."""

LABEL = 14
"""Letters that fit beside the chart."""

SHARES = frozenset(
    ("mcq", "circular", "yes_no", "chartqa", "ocrvqa", "gqa", "vqa_exact", "mathvision", "videomme", "longvideobench")
)
"""Rules whose score is the share of right answers, so that k right of n may be said."""


def write(folder: Path, out: Path, *, compare: str = "") -> None:
    """Write the page of the evaluated model ``folder`` (``out/MODEL``) to the file ``out``, atomically.

    ``compare``: the model of the report whose figures stand beside ours (default: the released 2B model).
    Raises ValueError for a model the report does not have.
    """
    known = {model for model, _ in printed()}
    if compare and compare not in known:
        raise ValueError(f"the report has no model {compare!r}; it has {', '.join(sorted(known))}")
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = duration
    write_text(out, environment.get_template("bench_report.html").render(context(folder, compare or MODELS[0])))


def context(folder: Path, compare: str) -> dict[str, Any]:
    """What the template shows."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/scores.json"))]
    order = {benchmark.name: number for number, benchmark in enumerate(SUITE)}
    whole = {benchmark.name: benchmark.n for benchmark in SUITE}
    results.sort(key=lambda result: (order.get(result["benchmark"], len(order)), result["data"]))
    for result in results:
        result["reported"] = result["printed"].get(compare)
        result["count"] = _count(result)
        result["whole"] = whole.get(result["benchmark"])
        result["parts"] = sorted(result["scores"].items())
        result["samples"] = _samples(folder / result["data"])
    bars = [
        charts.Interval(
            label=_label(result),
            value=result["score"] / 100,
            low=(result["low"] if result["low"] is not None else result["score"]) / 100,
            high=(result["high"] if result["high"] is not None else result["score"]) / 100,
            chance=None if result["reported"] is None else result["reported"] / 100,
        )
        for result in results
        if 0 <= result["score"] <= 100
    ]
    spoken = "Score of every data set with its 95 % interval; a tick marks the report's figure."
    return {
        "model": folder.name,
        "compare": compare,
        "style": Markup((HERE / "report.css").read_text(encoding="utf-8")),
        "made": time.strftime("%Y-%m-%d %H:%M %Z"),
        "results": results,
        "opencompass": opencompass(results),
        "reported_average": printed().get((compare, "OpenCompass_avg")),
        "chart": charts.both(lambda width: charts.intervals(bars, width, spoken)) if bars else None,
        "strict": any(result["mode"] == "strict" for result in results),
        "judges": sorted({result["judge"] for result in results if result["judge"]}),
        "seconds": sum(result["speed"].get("seconds", 0.0) for result in results),
        "answers": sum(result["n"] for result in results),
    }


def opencompass(results: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean of the OpenCompass eight; None unless all are there, each by one file, under the published rules."""
    scores: dict[str, list[float]] = {}
    for result in results:
        if result["mode"] == "published":
            scores.setdefault(result["benchmark"], []).append(result["score"])
    wanted = [scores.get(benchmark.name, []) for benchmark in OPENCOMPASS]
    if any(len(found) != 1 for found in wanted):
        return None
    return float(sum(found[0] for found in wanted) / len(wanted))


def _count(result: Mapping[str, Any]) -> str:
    """k / n, if the score is one by its rule."""
    plain = bool(result["n"]) and result["metric"] in SHARES
    k = count_of(round(result["score"], 6), result["n"], decimals=6) if plain else None
    return "" if k is None else f"{k:,} / {result['n']:,}"


def _label(result: Mapping[str, Any]) -> str:
    """The data set's name, or its benchmark's where that fits better, cut to the chart's margin."""
    name = result["data"] if len(result["data"]) <= LABEL else result["benchmark"]
    return str(name if len(name) <= LABEL else f"{name[: LABEL - 1]}…")


def _samples(folder: Path) -> list[dict[str, Any]]:
    try:
        samples: list[dict[str, Any]] = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    for sample in samples:
        sample["image"] = _picture(folder / "pictures" / sample["picture"]) if sample["picture"] else None
    return samples


def _picture(path: Path) -> dict[str, Any] | None:
    try:
        image = Image.open(path).convert("RGB")
    except OSError:
        return None
    scale = 2 if image.width <= SMALL // 2 else 1
    image.thumbnail((2 * SMALL, 2 * SMALL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"uri": uri, "width": min(image.width * scale, SMALL), "height": image.height}
