"""Write one HTML page that shows a run: what was trained, how it went, what the model can do, and how sure that is.

The page is one file without scripts or outside resources, readable offline, on a phone, in the dark, on paper, and by
a screen reader. Jinja escapes everything that comes from models and data, and the page's own content policy forbids
scripts and fetching should that ever fail. Figures stand next to their intervals, right answers next to wrong ones.

Cost: about a second for twelve stages; the page weighs some 100 kB plus its pictures.
"""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from sailvl.eval import charts, curves
from sailvl.eval.pictures import picture_name
from sailvl.eval.runfolder import Run, Stage, changes, curve, read
from sailvl.files import write_text
from sailvl.verify import final_answer
from sailvl.verify.grounding import box

HERE = Path(__file__).parent
DOUBLED = 240
"""Pictures up to this many pixels wide are shown at twice their size, pixel by pixel."""
SHOWN = 4
"""Answers of each family shown at once, half of them right if there are so many; the others open on demand."""


def write(run_dir: Path, out: Path) -> None:
    """Write the report of the run folder ``run_dir`` to the file ``out``, atomically; incomplete runs are welcome."""
    run = read(run_dir)
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "duration": duration,
        "count": count,
        "percent": percent,
        "short": curves.short,
        "points": points,
    }
    page = environment.get_template("report.html").render(context(run))
    write_text(out, page)


def context(run: Run) -> dict[str, Any]:
    """What the page's template shows, as plain values and finished charts."""
    scored = [stage for stage in run.stages if stage.scores]
    final = scored[-1] if scored else None
    cards = gallery(final, run) if final else {}
    rights = [card for group in cards.values() for card in group if card["right"] and len(card["truth"]) <= 60]
    done = [stage for stage in run.stages if stage.done]
    return {
        "run": run,
        "style": Markup((HERE / "report.css").read_text(encoding="utf-8")),
        "made": time.strftime("%Y-%m-%d %H:%M %Z"),
        "final": final,
        "best": max(scored, key=lambda stage: stage.scores.headline.mean if stage.scores else 0.0, default=None),
        "scored": scored,
        "hero": max(rights, key=lambda card: (1 - card["chance"], len(card["truth"])), default=None),
        "rows": plan_rows(run),
        "finished": len(done),
        "surroundings": surroundings(done),
        "cards": {family: halves(group) for family, group in cards.items()},
        "families": sorted({row["family"] for stage in scored for row in stage.answers.values()}),
        "changes": {stage.name: changes(stage, run) for stage in scored},
        "languages": languages(final) if final else [],
        "recipe": json.dumps(run.spec, indent=1, ensure_ascii=False),
        **drawings(run, scored, final),
    }


def drawings(run: Run, scored: Sequence[Stage], final: Stage | None) -> dict[str, Any]:
    """The four charts, None where there is nothing to draw, and the signs of the legend."""
    found = [line for stage in run.stages if (line := curve(stage))]
    steps = [
        charts.Interval(label=f"{stage.number}  {stage.name}", value=top.mean, low=top.low, high=top.high)
        for stage in scored
        if stage.scores and (top := stage.scores.headline)
    ]
    families = [
        charts.Interval(label=name, value=s.accuracy, low=s.low, high=s.high, chance=s.chance)
        for name, s in (final.scores.families.items() if final and final.scores else ())
    ]
    split = [charts.Pair(label=name, en=en, zh=zh) for name, en, zh in (languages(final) if final else [])]
    label = "Mean chance-corrected accuracy after each stage, with 95 % intervals; the table below gives the figures."
    return {
        "steps_chart": charts.both(lambda width: charts.intervals(steps, width, label)) if len(steps) > 1 else None,
        "curves_chart": charts.both(lambda width: curves.curves(found, width, _spoken(found))) if found else None,
        "families_chart": charts.both(
            lambda width: charts.intervals(families, width, "Accuracy by family with 95 % intervals and chance.")
        )
        if families
        else None,
        "languages_chart": charts.both(
            lambda width: charts.pairs(split, width, "Accuracy by family in English and in Chinese.")
        )
        if any(row.en is not None and row.zh is not None for row in split)
        else None,
        "signs": {kind: curves.sign(kind) for kind in ("snapshot", "kept", "undecided", "rollback")},
        "searched": any(line.marks for line in found),
    }


def _spoken(found: Iterable[curves.Curve]) -> str:
    ends = [f"stage {c.number} {c.name} from {c.loss[0][1]:.2f} to {c.loss[-1][1]:.2f}" for c in found if c.loss]
    return "Loss and learning rate over all stages. Loss: " + "; ".join(ends) + "."


def plan_rows(run: Run) -> list[dict[str, Any]]:
    """The curriculum as run, a row per stage."""
    whole = sum(stage.seconds for stage in run.stages) or 1.0
    numbers = {stage.name: stage.number for stage in run.stages}
    rows = []
    for stage in run.stages:
        spec = stage.spec
        schedule = spec.get("schedule") or {}
        rows.append(
            {
                "stage": stage,
                "parents": [(numbers.get(name, "?"), name) for name in stage.parents],
                "trains": [(name, part in spec.get("trains", ())) for part, name in PARTS],
                "fresh": "projector" in spec.get("fresh", ()),
                "data": sorted((spec.get("data") or {}).get("shares", {}).items(), key=lambda pair: -pair[1]),
                "schedule": " on ".join(filter(None, (schedule.get("kind"), (schedule.get("base") or {}).get("kind")))),
                "samples": stage.total("samples"),
                "tokens": stage.total("tokens"),
                "share": stage.seconds / whole,
                "state": "done" if stage.done else "running or stopped" if stage.folder else "not started",
            }
        )
    return rows


PARTS = (("vit", "ViT"), ("projector", "projector"), ("lm", "LM"))


def surroundings(done: Sequence[Stage]) -> list[tuple[str, str]]:
    """Hardware, versions and commit of the finished stages; several values where they differ."""
    found: dict[str, dict[str, None]] = {}
    for stage in done:
        for name in ("commit", "hardware", "versions"):
            value = stage.done.get(name)
            for key, item in value.items() if isinstance(value, Mapping) else [(name, value)]:
                if item is not None:
                    found.setdefault(str(key), {})[str(item)] = None
    return [(key, ", ".join(values)) for key, values in found.items()]


def languages(stage: Stage) -> list[tuple[str, float | None, float | None]]:
    """Family, accuracy in English, accuracy in Chinese; None where nothing was asked."""
    groups: dict[str, dict[str, list[float]]] = {}
    for row in stage.answers.values():
        groups.setdefault(row["family"], {}).setdefault(row["lang"], []).append(row["score"])

    def mean(scores: list[float] | None) -> float | None:
        return sum(scores) / len(scores) if scores else None

    return [(family, mean(langs.get("en")), mean(langs.get("zh"))) for family, langs in sorted(groups.items())]


def gallery(final: Stage, run: Run) -> dict[str, list[dict[str, Any]]]:
    """By family: questions whose picture was kept at the last evaluation, with what every stage answered."""
    cards: dict[str, list[dict[str, Any]]] = {}
    for name, row in sorted(final.answers.items()):
        picture = _picture(final, name) if row.get("picture") else None
        if picture is None:
            continue
        history = [
            {"number": other.number, "name": other.name, "right": old["score"] >= 1, "answer": old["answer"]}
            for other in run.stages
            if (old := other.answers.get(name))
        ]
        boxes = _boxes(row) if row["verifier"] == "iou" else []
        card = {**row, **picture, "right": row["score"] >= 1, "history": history, "boxes": boxes}
        if boxes:
            card |= {key: re.sub("</?box>", "", row[key]) for key in ("answer", "truth")}
        cards.setdefault(row["family"], []).append(card)
    return cards


def halves(group: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """A family's cards: the ``first`` ones, as many right as wrong while both last, right ones before; the ``rest``."""
    right = [card for card in group if card["right"]]
    wrong = [card for card in group if not card["right"]]
    num_right = max(SHOWN // 2, SHOWN - len(wrong))
    num_wrong = max(SHOWN // 2, SHOWN - len(right))
    return {"first": right[:num_right] + wrong[:num_wrong], "rest": right[num_right:] + wrong[num_wrong:]}


def _picture(stage: Stage, name: str) -> dict[str, Any] | None:
    path = (stage.folder or Path()) / "eval" / "pictures" / picture_name(name)
    try:
        data = path.read_bytes()
        width, height = Image.open(io.BytesIO(data)).size
    except OSError:
        return None
    scale = 2 if width <= DOUBLED else 1
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"uri": uri, "width": width * scale, "height": height * scale, "across": width > DOUBLED}


def _boxes(row: Mapping[str, Any]) -> list[tuple[str, float, float, float, float]]:
    """(kind, x, y, width, height) in thousandths of the picture: the truth, and the answer if it is a box."""
    named = (("answer", box(final_answer(row["answer"]))), ("truth", box(row["truth"])))
    return [(kind, b[0], b[1], b[2] - b[0], b[3] - b[1]) for kind, b in named if b]


def duration(seconds: float) -> str:
    """42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(number: float) -> str:
    """950, 12.3 k, 4.56 M, 7.8 G: three digits that matter."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size * 0.9995:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def percent(share: float) -> str:
    """61 %"""
    return f"{share:.0%}".replace("%", "\N{NO-BREAK SPACE}%")


def points(share: float) -> str:
    """A share in per cent with one decimal and a true minus: 61.3."""
    return f"{share * 100:.1f}".replace("-", "\N{MINUS SIGN}")
