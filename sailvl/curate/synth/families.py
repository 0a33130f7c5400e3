"""Scenes and the questions they can answer. A scene function returns pictures and every question it supports.

One scene supports several families, so a training record asks several questions about one picture (as LLaVA-style
instruction data does): the picture is encoded once and each answer is another supervised span. Positions snap to a
sixteenth of the side (half a ViT patch at the nano size), so that boxes are learnable from few samples.

Things are never asked for by a name: the test pictures show concepts that no training picture shows, so the name of a
test picture was never heard. They are asked for by kind, colour and place, which do carry over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from sailvl import assets
from sailvl.curate.synth import words
from sailvl.curate.synth.scene import Colour, Drawing, Shape, Sprite, Text, box_text, sprite_box
from sailvl.curate.synth.words import ASK, COLOURS, DIRECTIONS, KINDS, MOTIONS, NUMBERS, ORDINALS, YES_NO, Lang

PAPER: Colour = (250, 250, 250)
INK: Colour = (0, 0, 0)
LANGS: tuple[Lang, ...] = ("en", "zh")

Verifier = Literal["exact", "number", "choice", "iou", "edit"]


@dataclass(frozen=True)
class Turn:
    """A question, its exact answer, and for longer problems the thought that leads there."""

    family: str
    question: str
    answer: str
    verifier: Verifier
    thought: str = ""


@dataclass(frozen=True)
class Scene:
    """Pictures (several, or the frames of a clip) and what can be asked about them."""

    drawings: tuple[Drawing, ...]
    turns: tuple[Turn, ...]
    clip: bool = False


@dataclass(frozen=True)
class World:
    """What scenes are made of: one split's sprites by kind and number columns of its real tables."""

    kinds: dict[str, tuple[str, ...]]
    columns: tuple[tuple[float, ...], ...]
    side: int

    @property
    def unit(self) -> float:
        """A sixteenth of the side, in pixels."""
        return self.side / 16


@functools.cache
def world(split: assets.Split, side: int) -> World:
    """The sprites and tables of a split; ``side`` is the pictures' side in pixels."""
    kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for item in assets.items(split=split):
        if item.category in kinds:
            kinds[item.category].append(item.id)
    columns = [
        tuple(float(value) for value in column)
        for table in assets.tables(split=split)
        for column in zip(*table.rows, strict=True)
        if all(isinstance(value, int | float) for value in column) and len(set(column)) >= 4
    ]
    return World({kind: tuple(ids) for kind, ids in kinds.items() if ids}, tuple(columns), side)


def _ask(rng: Random, key: str, lang: Lang, fixed: bool, **names: object) -> str:
    wordings = ASK[key][lang]
    return (wordings[0] if fixed else rng.choice(wordings)).format(**names)


def _shade(rng: Random, colour: str) -> Colour:
    red, green, blue = (min(255, max(0, value + rng.randint(-18, 18))) for value in COLOURS[colour][0])
    return red, green, blue


def _say(colour: str, lang: Lang) -> str:
    return COLOURS[colour][1][lang]


def _colours(rng: Random, count: int) -> list[str]:
    return rng.sample(sorted(COLOURS), count)


def _thing(rng: Random, world: World) -> tuple[str, str]:
    kind = rng.choice(sorted(world.kinds))
    return kind, rng.choice(world.kinds[kind])


def _caption(kind: str, colour: str, count: int, lang: Lang) -> str:
    one, many, hanzi = KINDS[kind]
    if lang == "zh":
        return f"{_say(colour, lang)}背景上有{NUMBERS[lang][count] if count > 1 else '一'}个{hanzi}。"
    return f"{NUMBERS[lang][count]} {one if count == 1 else many} on a {_say(colour, lang)} background."


def single(rng: Random, world: World, lang: Lang, fixed: bool) -> Scene:
    """One thing somewhere on a coloured ground."""
    unit, side = world.unit, world.side
    kind, item = _thing(rng, world)
    colour = rng.choice(sorted(COLOURS))
    size = rng.choice((6, 8, 10, 12))
    spread = 16 - size
    centre = tuple((size / 2 + rng.randint(0, spread)) * unit for _ in range(2))
    sprite = Sprite(item, (centre[0], centre[1]), round(size * unit))
    thing = KINDS[kind][2] if lang == "zh" else KINDS[kind][0]
    return Scene(
        (Drawing(side, side, _shade(rng, colour), (sprite,)),),
        (
            Turn("name", _ask(rng, "name", lang, fixed), thing, "exact"),
            Turn("colour", _ask(rng, "background", lang, fixed), _say(colour, lang), "exact"),
            Turn(
                "where", _ask(rng, "where", lang, fixed, thing=thing), box_text(sprite_box(sprite), side, side), "iou"
            ),
            Turn("caption", _ask(rng, "caption", lang, fixed), _caption(kind, colour, 1, lang), "exact"),
        ),
    )


def _group(rng: Random, world: World, count: int, colour: str, kind: str) -> Drawing:
    """``count`` things of a kind, each in its own cell of a 3 x 3 grid, so that none hides another."""
    unit = world.unit
    parts = []
    for cell in rng.sample(range(9), count):
        column, row = cell % 3, cell // 3
        x, y = ((16 / 3 * (index + 0.5) + rng.uniform(-0.4, 0.4)) * unit for index in (column, row))
        parts.append(Sprite(rng.choice(world.kinds[kind]), (x, y), round(rng.choice((4, 4.5)) * unit)))
    return Drawing(world.side, world.side, PAPER if colour == "white" else _shade(rng, colour), tuple(parts))


def _counting(count: int, lang: Lang) -> str:
    listed = ", ".join(str(number) for number in range(1, count + 1))
    return f"一个一个数: {listed}。" if lang == "zh" else f"One by one: {listed}."


def group(rng: Random, world: World, lang: Lang, fixed: bool) -> Scene:
    """One to five things of one kind on white paper."""
    count, colour, kind = rng.randint(1, 5), "white", rng.choice(sorted(world.kinds))
    return Scene(
        (_group(rng, world, count, colour, kind),),
        (
            Turn("count", _ask(rng, "count", lang, fixed), str(count), "number", _counting(count, lang)),
            Turn("name", _ask(rng, "name", lang, fixed), KINDS[kind][2] if lang == "zh" else KINDS[kind][0], "exact"),
            Turn("caption", _ask(rng, "caption", lang, fixed), _caption(kind, colour, count, lang), "exact"),
        ),
    )


def pair(rng: Random, world: World, lang: Lang, fixed: bool) -> Scene:
    """A thing and a ball on white paper, clearly beside or above each other."""
    unit, side = world.unit, world.side
    ball = rng.choice([colour for colour in sorted(COLOURS) if colour != "white"])
    sideways, ball_first = rng.random() < 0.5, rng.random() < 0.5
    near, far = rng.uniform(2.5, 5), rng.uniform(11, 13.5)  # along the axis that matters they are far apart
    level = rng.uniform(6, 10), rng.uniform(6, 10)  # and across it not: one answer is right
    centres = [(near, level[0]), (far, level[1])] if sideways else [(level[0], near), (level[1], far)]
    (ball_x, ball_y), (x, y) = centres if ball_first else centres[::-1]
    radius = 2.5
    box = tuple(value * unit for value in (ball_x - radius, ball_y - radius, ball_x + radius, ball_y + radius))
    shape = Shape((box[0], box[1], box[2], box[3]), _shade(rng, ball), ellipse=True)
    kind, item = _thing(rng, world)
    sprite = Sprite(item, (x * unit, y * unit), round(5 * unit))
    thing = KINDS[kind][2] if lang == "zh" else KINDS[kind][0]
    low, high = ("left", "right") if sideways else ("above", "below")
    turns = (
        Turn(
            "relation",
            _ask(rng, "relation", lang, fixed, thing=thing),
            DIRECTIONS[high if ball_first else low][lang],
            "exact",
        ),
        Turn("colour", _ask(rng, "ball", lang, fixed), _say(ball, lang), "exact"),
        Turn("name", _ask(rng, "name", lang, fixed), thing, "exact"),
        Turn("where", _ask(rng, "where", lang, fixed, thing=thing), box_text(sprite_box(sprite), side, side), "iou"),
    )
    return Scene((Drawing(side, side, PAPER, (shape, sprite)),), turns)


def ocr(rng: Random, world: World, lang: Lang, fixed: bool) -> Scene:
    """A line of one to three digits or Latin letters, in Chinese also hanzi. One in six is a wide strip."""
    side, unit = world.side, world.unit
    letters = rng.choice((words.DIGITS, words.HANZI if lang == "zh" else words.LATIN))
    text = "".join(rng.choice(letters) for _ in range(rng.randint(1, 3)))
    colour = rng.choice(("white", "yellow"))
    size = round(rng.choice((6, 7)) * unit)
    width = 2 * side if rng.random() < 1 / 6 else side
    free = width - size * len(text)
    x = width / 2 + rng.uniform(-0.3, 0.3) * max(0, free)
    y = rng.uniform(0.3, 0.7) * side
    drawing = Drawing(width, side, _shade(rng, colour), (Text(text, (x, y), size, INK),))
    return Scene((drawing,), (Turn("ocr", _ask(rng, "ocr", lang, fixed), text, "edit"),))


def _series(rng: Random, world: World, count: int, top: int) -> list[int]:
    """``count`` different whole numbers in 1..top: values of a real column, scaled."""
    column = rng.choice(world.columns)
    low, high = min(column), max(column)
    scaled = sorted({1 + round((value - low) / (high - low) * (top - 1)) for value in column})
    if len(scaled) < count:
        scaled = list(range(1, top + 1))
    return rng.sample(scaled, count)


def chart(rng: Random, world: World, lang: Lang, fixed: bool) -> Scene:
    """A bar chart of three or four values of a real table, 1 to 9 on its axis."""
    unit, side = world.unit, world.side
    count = rng.randint(3, 4)
    values = _series(rng, world, count, 9)
    names = rng.sample([colour for colour in sorted(COLOURS) if colour != "white"], count)
    base, step = 15 * unit, 1.5 * unit
    grid = [Shape((2 * unit, base - line * step, side, base - line * step), (200, 200, 200)) for line in range(10)]
    scale = [Text(str(line), (unit, base - line * step), round(2.2 * unit), (60, 60, 60)) for line in (3, 6, 9)]
    pitch = 14 / count
    bars = [
        Shape(((2.4 + i * pitch) * unit, base - value * step, (1.6 + (i + 1) * pitch) * unit, base), _shade(rng, name))
        for i, (value, name) in enumerate(zip(values, names, strict=True))
    ]
    drawing = Drawing(side, side, (250, 250, 250), (*grid, *scale, *bars))
    spoken = [_say(name, lang) for name in names]
    most, least = spoken[values.index(max(values))], spoken[values.index(min(values))]
    listed = ", ".join(f"{name} {value}" for name, value in zip(spoken, values, strict=True))
    think = {"en": (f"{listed}. The highest is {{0}}.", f"{listed}. The lowest is {{0}}.")}
    think["zh"] = (f"{listed}。最高的是{{0}}。", f"{listed}。最低的是{{0}}。")
    pick = rng.randrange(count)
    return Scene(
        (drawing,),
        (
            Turn("chart", _ask(rng, "chart-most", lang, fixed), most, "exact", think[lang][0].format(most)),
            Turn("chart", _ask(rng, "chart-least", lang, fixed), least, "exact", think[lang][1].format(least)),
            Turn("chart", _ask(rng, "chart-value", lang, fixed, colour=spoken[pick]), str(values[pick]), "number"),
            Turn("describe", _ask(rng, "describe", lang, fixed), listed, "exact"),
        ),
    )


def table(rng: Random, world: World, lang: Lang, fixed: bool) -> Scene:
    """A table of 2 x 2 to 3 x 3 one-digit values of a real column, under the headings A, B, C."""
    unit, side = world.unit, world.side
    rows, columns = rng.randint(2, 3), rng.randint(2, 3)
    values = [_series(rng, world, columns, 9) for _ in range(rows)]
    cell_w, cell_h, size = 12.5 / columns, 12.5 / rows, round(3.6 * unit)
    parts: list[Shape | Text] = [Shape((3 * unit, 3 * unit, side, side), (255, 255, 255))]
    for line in range(rows):
        y = (3.2 + line * cell_h) * unit
        parts.append(Shape((0, y, side, y), (150, 150, 150)))
        parts.append(Text(str(line + 1), (1.5 * unit, y + cell_h * unit / 2), size, (160, 30, 30)))
    for line in range(columns):
        x = (3.2 + line * cell_w) * unit
        parts.append(Shape((x, 0, x, side), (150, 150, 150)))
        parts.append(Text("ABC"[line], (x + cell_w * unit / 2, 1.6 * unit), size, (30, 30, 160)))
    for row, line_values in enumerate(values):
        for column, value in enumerate(line_values):
            centre = ((3.2 + (column + 0.5) * cell_w) * unit, (3.2 + (row + 0.5) * cell_h) * unit)
            parts.append(Text(str(value), centre, size, (0, 0, 0)))
    cells = rng.sample([(row, column) for row in range(rows) for column in range(columns)], min(3, rows * columns))
    turns = tuple(
        Turn(
            "table",
            _ask(rng, "table", lang, fixed, row=row + 1, column="ABC"[column]),
            str(values[row][column]),
            "number",
        )
        for row, column in cells
    )
    whole = ", ".join(" ".join(map(str, line_values)) for line_values in values)
    turns = (*turns, Turn("describe", _ask(rng, "describe", lang, fixed), whole, "exact"))
    return Scene((Drawing(side, side, (235, 235, 225), tuple(parts)),), turns)


def arithmetic(rng: Random, world: World, lang: Lang, fixed: bool) -> Scene:
    """A sum or difference of two digits, its result 0 to 9."""
    unit, side = world.unit, world.side
    if rng.random() < 0.5:
        result = rng.randint(1, 9)
        a = rng.randint(0, result)
        text, b, result = f"{a}+{result - a}", result - a, result
        thought = f"{a} + {b} = {result}"
    else:
        a = rng.randint(1, 9)
        b = rng.randint(0, a)
        text, result = f"{a}-{b}", a - b
        thought = f"{a} - {b} = {result}"
    colour = rng.choice(("white", "yellow"))
    x, y = side / 2 + rng.uniform(-1, 1) * unit, side / 2 + rng.uniform(-3, 3) * unit
    drawing = Drawing(side, side, _shade(rng, colour), (Text(text, (x, y), round(7 * unit), INK),))
    turns = (
        Turn("arithmetic", _ask(rng, "arithmetic", lang, fixed), str(result), "number", thought),
        Turn("ocr", _ask(rng, "ocr", lang, fixed), text, "edit"),
    )
    return Scene((drawing,), turns)


def compare(rng: Random, world: World, lang: Lang, fixed: bool) -> Scene:
    """Two pictures: which shows more things, or are their grounds of one colour?"""
    kinds = [rng.choice(sorted(world.kinds)) for _ in range(2)]
    if rng.random() < 0.5:
        counts = rng.sample(range(1, 6), 2)
        shown = list(zip(kinds, ("white", "white"), counts, strict=True))
        more = ORDINALS["first" if counts[0] > counts[1] else "second"][lang]
        thought = {
            "en": f"The first shows {counts[0]}, the second {counts[1]}.",
            "zh": f"第一张有{counts[0]}个,第二张有{counts[1]}个。",
        }[lang]
        turn = Turn("compare", _ask(rng, "compare-more", lang, fixed), more, "exact", thought)
    else:
        first, second = _colours(rng, 2)
        same = rng.random() < 0.5
        shown = [(kinds[0], first, 1), (kinds[1], first if same else second, 1)]
        turn = Turn("compare", _ask(rng, "compare-colour", lang, fixed), YES_NO[same][lang], "exact")
    drawings = tuple(_group(rng, world, count, colour, kind) for kind, colour, count in shown)
    said = " ".join(_caption(kind, colour, count, lang) for kind, colour, count in shown)
    return Scene(drawings, (turn, Turn("describe", _ask(rng, "describe", lang, fixed), said, "exact")))


def clip(rng: Random, world: World, lang: Lang, fixed: bool) -> Scene:
    """A thing moving in a straight line, three frames."""
    unit, side = world.unit, world.side
    _, item = _thing(rng, world)
    way = rng.choice(sorted(MOTIONS))
    across = rng.uniform(6, 10)
    path = [rng.uniform(3, 4.5), rng.uniform(7, 9), rng.uniform(11.5, 13)]
    if way in ("left", "up"):
        path.reverse()
    frames = []
    for along in path:
        x, y = (along, across) if way in ("left", "right") else (across, along)
        frames.append(Drawing(side, side, PAPER, (Sprite(item, (x * unit, y * unit), round(6 * unit)),)))
    return Scene(tuple(frames), (Turn("clip", _ask(rng, "clip", lang, fixed), MOTIONS[way][lang], "exact"),), clip=True)


SceneFunction = Callable[[Random, World, Lang, bool], Scene]

FAMILIES: dict[str, tuple[SceneFunction, ...]] = {
    "caption": (single, group),
    "name": (single, pair),
    "colour": (single,),
    "count": (group,),
    "where": (single, pair),
    "relation": (pair,),
    "ocr": (ocr,),
    "chart": (chart,),
    "table": (table,),
    "arithmetic": (arithmetic,),
    "compare": (compare,),
    "clip": (clip,),
    "describe": (chart, table, compare),
}
"""Which scenes can answer a family's question."""
