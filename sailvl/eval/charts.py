"""The report's charts as inline SVG: no script, no library, colours from the page's own variables.

Why by hand: three kinds of chart (the training curves are in ``curves``), each some fifty lines, weigh a few kilobytes
in the page, follow its light and dark colours, and stay sharp in print. Text keeps its size only if a drawing is shown
near its own width, so every chart is drawn twice, for a desk and for a phone, and the page shows one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDE, NARROW = 1000, 380
"""Widths in pixels at which a chart is drawn."""

Point = tuple[float, float]
Scale = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A labelled estimate with its interval, all fractions; ``chance`` is where guessing lands (None: not shown)."""

    label: str
    value: float
    low: float
    high: float
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The English and the Chinese value of one thing, fractions; None where nothing was asked."""

    label: str
    en: float | None
    zh: float | None


def both(draw: Callable[[int], Markup]) -> Markup:
    """A chart at both widths; the style sheet shows the one that fits."""
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(draw(WIDE), draw(NARROW))


def intervals(rows: Sequence[Interval], width: int, label: str) -> Markup:
    """One line per estimate: interval, dot, its value in figures, and a tick at chance."""
    left, right, pitch, top = (132, 62, 30, 8) if width == WIDE else (132, 48, 30, 8)
    low = min([0.0, *(row.low for row in rows)])
    x = linear(low, 1, left, width - right)
    bottom = top + pitch * len(rows)
    body = [_percent_grid(x, low, top, bottom, 0.2 if width == WIDE else 0.5)]
    for index, row in enumerate(rows):
        y = top + pitch * (index + 0.5)
        body.append(text(left - 12, y + 4, clip(row.label, left - 14), "end", "name"))
        if row.chance is not None:
            body.append(line(x(row.chance), y - 9, x(row.chance), y + 9, "chance"))
        body.append(line(x(row.low), y, x(row.high), y, "whisker"))
        body.append(Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(x(row.value), y))
        body.append(text(width - 4, y + 4, f"{row.value:.0%}", "end", "figure"))
    return svg(width, bottom + 26, label, body)


def pairs(rows: Sequence[Pair], width: int, label: str) -> Markup:
    """One line per thing: a disc for English, a diamond for Chinese, joined; both values in figures."""
    left, right, pitch, top = (124, 136, 30, 8) if width == WIDE else (96, 96, 30, 8)
    x = linear(0, 1, left, width - right)
    bottom = top + pitch * len(rows)
    body = [_percent_grid(x, 0.0, top, bottom, 0.2 if width == WIDE else 0.5)]
    for index, row in enumerate(rows):
        y = top + pitch * (index + 0.5)
        body.append(text(left - 12, y + 4, clip(row.label, left - 14), "end", "name"))
        if row.en is not None and row.zh is not None:
            body.append(line(x(row.en), y, x(row.zh), y, "join"))
        if row.zh is not None:
            shape = Markup('<path class="zh" d="M{:.1f} {:.1f}l6.5 6.5l-6.5 6.5l-6.5 -6.5z"/>')
            body.append(shape.format(x(row.zh), y - 6.5))
        if row.en is not None:
            body.append(Markup('<circle class="en" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(x(row.en), y))
        for value, column, kind in ((row.en, right / 2 - 4, "en"), (row.zh, 4, "zh")):
            shown = "n/a" if value is None else f"{value:.0%}"
            body.append(text(width - column, y + 4, shown, "end", f"figure {kind}-text"))
    return svg(width, bottom + 26, label, body)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from low to high, about so many."""
    if high <= low:
        return [low]
    raw = (high - low) / max(about, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def clip(label: str, room: float) -> str:
    """The label, cut to about ``room`` pixels: Latin letters take 6.6, Chinese ones 13."""
    widths = [6.6 if ord(letter) < 0x2E80 else 13.0 for letter in label]
    if sum(widths) <= room:
        return label
    kept = [letter for place, letter in enumerate(label) if sum(widths[: place + 1]) <= room - 8]
    return "".join(kept) + "…"


def _percent_grid(x: Scale, low: float, top: float, bottom: float, step: float) -> Markup:
    marks = [index * step for index in range(math.ceil(low / step), round(1 / step) + 1)]
    lines = [line(x(value), top, x(value), bottom, "zero" if value == 0 else "grid") for value in marks]
    texts = [text(x(value), bottom + 18, f"{value:.0%}", "middle") for value in marks]
    return Markup("").join(lines + texts)


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Map low..high to start..end."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A line of a class of the style sheet."""
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, x1, y1, x2, y2)


def text(x: float, y: float, content: str, anchor: str, kind: str = "") -> Markup:
    """Words, escaped; ``anchor`` is start, middle or end."""
    shape = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return shape.format(kind, x, y, anchor, content)


def svg(width: int, height: float, label: str, body: Sequence[Markup]) -> Markup:
    """A drawing that a screen reader reads as ``label``."""
    head = Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">').format(width, height, escape(label))
    return head + Markup("").join(body) + Markup("</svg>")
