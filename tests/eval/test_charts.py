import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from sailvl.eval.charts import NARROW, WIDE, Interval, Pair, clip, intervals, pairs, ticks
from sailvl.eval.curves import Curve, curves, log_ticks, short, smooth, thin


def parse(chart: Markup) -> ElementTree.Element:
    return ElementTree.fromstring(str(chart))


def boxes(chart: ElementTree.Element) -> list[tuple[float, float, float, float, str]]:
    """About where each text lies, with the widest letters of common fonts: 7 pixels a letter, 12 high."""
    found = []
    for item in chart.iter("text"):
        if item.get("transform"):
            continue
        words, x, y = item.text or "", float(item.get("x")), float(item.get("y"))
        width = 6.6 * len(words)
        left = x - {"start": 0, "middle": width / 2, "end": width}[item.get("text-anchor")]
        found.append((left, y - 10, left + width, y + 2, words))
    return found


def check_texts(chart: Markup, width: int) -> None:
    tree = parse(chart)
    height = float(tree.get("viewBox").split()[3])
    texts = boxes(tree)
    for left, top, right, bottom, words in texts:
        assert left >= -1 and right <= width + 12 and top >= -3 and bottom <= height, words
    for index, one in enumerate(texts):
        for other in texts[index + 1 :]:
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart, (one, other)


def stages(count: int, steps: int) -> list[Curve]:
    return [
        Curve(
            number=number,
            name=f"stage-{number}",
            steps=steps * (1 + number % 3),
            loss=tuple((step, 9 / step) for step in range(1, steps + 1)),
            lr=tuple((step, 1e-3 * step / steps) for step in range(1, steps + 1)),
            marks=((steps / 2, "snapshot"), (steps, "rollback")),
            trains=("projector",),
        )
        for number in range(1, count + 1)
    ]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_texts_stay_inside_and_apart(width: int) -> None:
    long = "a very long name of a family or stage that nobody would read to its end"
    rows = [Interval(label=f"{n}  {long}", value=v, low=v / 2, high=1.0, chance=0.1) for n, v in enumerate((0, 0.5, 1))]
    rows.append(Interval(label="below chance", value=-0.1, low=-0.24, high=0.01))
    check_texts(intervals(rows, width, "x"), width)
    check_texts(pairs([Pair(label=long, en=1.0, zh=1.0), Pair(label="图" * 30, en=None, zh=0.5)], width, "x"), width)
    for count, steps in ((1, 1), (1, 50), (12, 80), (40, 12), (3, 100_000 // 3)):
        few = stages(count, min(steps, 200))
        check_texts(curves(few, width, "x"), width)


def test_positions_follow_the_values() -> None:
    rows = [Interval(label=str(v), value=v, low=v - 0.1, high=v + 0.1, chance=0.25) for v in (0.2, 0.4, 0.8)]
    tree = parse(intervals(rows, WIDE, "x"))
    dots = [float(dot.get("cx")) for dot in tree.iter("circle")]
    assert (dots[2] - dots[1]) == pytest.approx(2 * (dots[1] - dots[0]), abs=0.3)
    whiskers = [line for line in tree.iter("line") if line.get("class") == "whisker"]
    for dot, line in zip(dots, whiskers, strict=True):
        assert (float(line.get("x1")) + float(line.get("x2"))) / 2 == pytest.approx(dot, abs=0.1)


def test_curves_fall_on_the_page_as_the_loss_falls() -> None:
    tree = parse(curves(stages(2, 50), WIDE, "x"))
    paths = [path.get("d") for path in tree.iter("path") if path.get("class") == "curve"]
    assert len(paths) == 2
    for path in paths:
        heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
        assert len(heights) > 10 and heights == sorted(heights)
    kinds = [rect.get("class") for rect in tree.iter("rect")]
    assert kinds.count("part on") == 2 and kinds.count("part") == 4


def test_curves_without_losses_or_rates_say_so() -> None:
    bare = Curve(number=1, name="one", steps=5, loss=((1, 0.0),), lr=(), marks=(), trains=())
    words = "".join(parse(curves([bare], WIDE, "x")).itertext())
    assert "no loss recorded yet" in words and "no learning rate recorded yet" in words
    flat = Curve(number=1, name="one", steps=5, loss=((1, 2.0), (2, 2.0)), lr=((1, 1e-3),), marks=(), trains=())
    parse(curves([flat], WIDE, "x"))


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 9))
def test_ticks_are_round_inside_and_neither_few_nor_many(low: float, span: float, about: int) -> None:
    high = low + span
    found = ticks(low, high, about)
    slack = 1e-6 * (abs(low) + span)
    assert all(low - slack <= value <= high + slack for value in found)
    assert len(found) <= about + 1


@given(st.floats(1e-4, 1e3), st.floats(1.1, 1e4))
def test_log_ticks_are_inside(low: float, factor: float) -> None:
    found = log_ticks(low, low * factor)
    assert all(low <= value <= low * factor for value in found)
    assert factor < 5 or found


def test_thin_and_smooth_keep_the_ends_and_the_mean() -> None:
    points = [(float(n), math.sin(n)) for n in range(1001)]
    few = thin(points, 100)
    assert len(few) <= 102 and few[0] == points[0] and few[-1] == points[-1]
    assert thin([], 5) == [] and smooth([(1.0, 2.0)]) == [(1.0, 2.0)]
    assert smooth([(float(n), 3.0 * n) for n in range(100)])[50] == (50.0, 150.0)


def test_short_and_clip() -> None:
    assert [short(v) for v in (0, 1e-3, 2.5e-4, 6.75e-4)] == ["0", "1e-3", "2.5e-4", "6.75e-4"]
    assert clip("colour", 100) == "colour"
    assert clip("x" * 50, 70) == "x" * 9 + "…"


def test_labels_are_escaped() -> None:
    chart = intervals([Interval(label="<b>&", value=0.5, low=0.4, high=0.6)], WIDE, 'say "<b>"')
    tree = parse(chart)
    assert tree.get("aria-label") == 'say "<b>"' and "<b>&" in "".join(tree.itertext())
