"""The training chart: loss, learning rate and which parts learn, over the steps of all stages one after another.

What AdaLRS did is marked on the learning rate, because a jump of it cannot be told from a warm-up otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sailvl.eval.charts import WIDE, Scale, line, linear, svg, text, ticks

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One stage's training: (step, nats per token), (step, learning rate), and what AdaLRS did at which step."""

    number: int
    name: str
    steps: int
    loss: tuple[Point, ...]
    lr: tuple[Point, ...]
    marks: tuple[tuple[float, str], ...]
    trains: tuple[str, ...]


def curves(stages: Sequence[Curve], width: int, label: str) -> Markup:
    """Loss (logarithmic), learning rate, and which parts train, over the steps of all stages one after another."""
    left, right = (64, 8) if width == WIDE else (56, 4)
    offsets = [sum(stage.steps for stage in stages[:index]) for index in range(len(stages) + 1)]
    x = linear(0, max(offsets[-1], 1), left, width - right)
    loss_top, loss_bottom, lr_top, lr_bottom, parts_top = 26, 266, 300, 410, 432
    body = [_bands(stages, offsets, x, 20, parts_top + 54)]
    body.append(_loss_panel(stages, offsets, x, loss_top, loss_bottom, (left, width - right)))
    body.append(_lr_panel(stages, offsets, x, lr_top, lr_bottom, (left, width - right)))
    for row, (part, name) in enumerate((("vit", "ViT"), ("projector", "proj."), ("lm", "LM"))):
        y = parts_top + 18 * row
        body.append(text(left - 8, y + 10, name, "end"))
        for stage, start in zip(stages, offsets, strict=False):
            kind = "part on" if part in stage.trains else "part"
            span = max(x(start + stage.steps) - x(start) - 2, 1)
            shape = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="11" rx="2"/>')
            body.append(shape.format(kind, x(start) + 1, y, span))
    axis = parts_top + 72
    for tick in ticks(0, offsets[-1], 8 if width == WIDE else 4):
        body.append(text(x(tick), axis, f"{tick:,.0f}", "middle"))
    body.append(text((left + width - right) / 2, axis + 20, "optimizer steps, all stages", "middle"))
    return svg(width, axis + 28, label, body)


def _bands(stages: Sequence[Curve], offsets: Sequence[int], x: Scale, top: float, bottom: float) -> Markup:
    """Alternate shading of the stages, and each stage's number above where there is room for it."""
    body = []
    for index, stage in enumerate(stages):
        start, end = x(offsets[index]), x(offsets[index] + stage.steps)
        if index % 2 == 0:
            shape = Markup('<rect class="band" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>')
            body.append(shape.format(start, top, end - start, bottom - top))
        if end - start > 9 * len(str(stage.number)):
            body.append(text((start + end) / 2, top - 6, str(stage.number), "middle", "number"))
    return Markup("").join(body)


def _loss_panel(
    stages: Sequence[Curve], offsets: Sequence[int], x: Scale, top: float, bottom: float, sides: tuple[float, float]
) -> Markup:
    losses = [loss for stage in stages for _, loss in stage.loss if loss > 0]
    if not losses:
        return text((sides[0] + sides[1]) / 2, (top + bottom) / 2, "no loss recorded yet", "middle")
    low, high = min(losses), max(losses)
    y = _logarithmic(low / 1.1, high * 1.1, bottom, top)
    body = [_axis_title("loss, nats per token", (top + bottom) / 2)]
    for tick in log_ticks(low / 1.1, high * 1.1):
        body.append(line(sides[0], y(tick), sides[1], y(tick), "grid"))
        body.append(text(sides[0] - 8, y(tick) + 4, f"{tick:g}", "end"))
    for stage, start in zip(stages, offsets, strict=False):
        points = [(start + step, loss) for step, loss in stage.loss if loss > 0]
        body.append(_path(thin(points, 240), x, y, "raw"))
        body.append(_path(thin(smooth(points), 160), x, y, "curve"))
    return Markup("").join(body)


def _lr_panel(
    stages: Sequence[Curve], offsets: Sequence[int], x: Scale, top: float, bottom: float, sides: tuple[float, float]
) -> Markup:
    peak = max((lr for stage in stages for _, lr in stage.lr), default=0.0)
    if peak <= 0:
        return text((sides[0] + sides[1]) / 2, (top + bottom) / 2, "no learning rate recorded yet", "middle")
    y = linear(0, peak * 1.08, bottom, top)
    body = [_axis_title("learning rate", (top + bottom) / 2)]
    for tick in ticks(0, peak * 1.08, 3):
        body.append(line(sides[0], y(tick), sides[1], y(tick), "grid"))
        body.append(text(sides[0] - 8, y(tick) + 4, short(tick), "end"))
    for stage, start in zip(stages, offsets, strict=False):
        points = [(start + step, lr) for step, lr in stage.lr]
        body.append(_path(thin(points, 300), x, y, "lr"))
        for step, kind in stage.marks:
            near = min(stage.lr, key=lambda point: abs(point[0] - step), default=(0.0, 0.0))
            body.append(mark(kind, x(start + step), y(near[1])))
    return Markup("").join(body)


def mark(kind: str, x: float, y: float) -> Markup:
    """AdaLRS's signs: a triangle for a trial, a disc for a raise that was kept, a cross for a rollback, a ring for a
    trial that decided nothing."""
    shapes = {
        "snapshot": '<path class="mark" d="M{x:.1f} {t:.1f}l5 9h-10z"/>',
        "kept": '<circle class="mark kept" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>',
        "undecided": '<circle class="mark ring" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>',
        "rollback": '<path class="mark cross" d="M{l:.1f} {t:.1f}l9 9m0 -9l-9 9"/>',
    }
    return Markup(shapes[kind]).format(x=x, y=y, t=y - 4.5, l=x - 4.5)


def sign(kind: str) -> Markup:
    """A mark on its own, for a legend; the words beside it carry the meaning."""
    body = Markup('<svg class="sign" viewBox="0 0 14 14" aria-hidden="true">{}</svg>')
    return body.format(mark(kind, 7, 7))


def smooth(points: Sequence[Point]) -> list[Point]:
    """Running mean over about a twentieth of the points."""
    reach = max(1, len(points) // 40)
    found = []
    for index, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, index - reach) : index + reach + 1]]
        found.append((x, math.fsum(window) / len(window)))
    return found


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most about ``most`` points, the first and last among them."""
    stride = max(1, math.ceil(len(points) / most))
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten between low and high; only powers of ten when those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [value for power in powers for factor in factors if low <= (value := factor * 10.0**power) <= high]


def short(value: float) -> str:
    """A learning rate in few signs: 0, 1e-3, 2.5e-4."""
    if value == 0:
        return "0"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def _logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + math.log(value / low) / math.log(high / low) * (end - start)


def _path(points: Sequence[Point], x: Scale, y: Scale, kind: str) -> Markup:
    if not points:
        return Markup("")
    steps = "L".join(f"{x(across):.1f} {y(up):.1f}" for across, up in points)
    return Markup('<path class="{}" d="M{}"/>').format(kind, steps)


def _axis_title(content: str, y: float) -> Markup:
    shape = Markup('<text class="title" transform="translate(11 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>')
    return shape.format(y, content)
