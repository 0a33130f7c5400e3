"""Boxes in answers: reading them, and drawing them on the picture they are about.

Grounded answers name places as ``<ref>the cat</ref><box>[[x1,y1,x2,y2]]</box>`` in thousandths of the picture's width
and height (technical report arXiv 2509.14033; quadrilaterals as ``<quad>`` with eight numbers). Models are not strict
about it, so this reader is not either: several boxes behind one name, tags missing because a decoder dropped them,
bare lists, corners in any order, blanks, full-width punctuation. What is no box is skipped; reading takes time linear
in the text. Judging an answer is strict and lies in ``sailvl.verify``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from sailvl.assets import font_path
from sailvl.media import to_rgb

SCALE = 1000
"""Coordinates run from 0 to this, whatever the picture's size."""

_HALF_WIDTH = str.maketrans("，．－［］０１２３４５６７８９", ",.-[]0123456789")  # one character for one: places stay
_SIGNED = r"[-+]?[0-9]{1,6}(?:\.[0-9]{1,9})?"
_BETWEEN = r"\s{0,8},\s{0,8}"
_FOUR = rf"{_SIGNED}(?:{_BETWEEN}{_SIGNED}){{3}}"
_TOKEN = re.compile(
    r"<ref>(?P<ref>[^<]{0,1000})</ref>|<quad>(?P<quad>[^<]{0,1000})</quad>|"
    rf"\[\s{{0,8}}(?P<list>{_FOUR}(?:{_BETWEEN}{_FOUR})?)\s{{0,8}}\]"
)
_GLUE = re.compile(r"(?:[\s,\[\]]|</?box>|</?quad>)*")
_NUMBERS = re.compile(_SIGNED)

_COLOURS = (
    "#e6194b", "#4363d8", "#3cb44b", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#9a6324", "#ffe119",
    "#469990", "#800000",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Box:
    """A place in pixels of the picture, the origin at its upper left: x1 < x2, y1 < y2, all within the picture.

    ``corners`` are the four of a quadrilateral, in its own order; () for a plain box.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""
    corners: tuple[tuple[float, float], ...] = ()


def parse_boxes(text: str, width: int, height: int) -> list[Box]:
    """The boxes of an answer about a picture of ``width`` x ``height`` pixels, in order.

    A name holds for the boxes directly behind it. Coordinates outside the picture are moved to its border; boxes that
    are empty then are skipped, as is what has not four numbers (eight: a quadrilateral). Raises ValueError for a
    picture without a pixel.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture needs at least one pixel, got {width} x {height}")
    boxes, label, at = [], "", 0
    plain = text.translate(_HALF_WIDTH)
    for found in _TOKEN.finditer(plain):
        if not _GLUE.fullmatch(plain, at, found.start()):
            label = ""  # something else was said since
        at = found.end()
        if found["ref"] is not None:
            label = text[slice(*found.span("ref"))].strip()
            continue
        numbers = [float(number) for number in _NUMBERS.findall(found["quad"] or found["list"] or "")]
        size = 8 if found["quad"] is not None or len(numbers) == 8 else 4
        if len(numbers) % size:
            continue
        for start in range(0, len(numbers), size):
            box = _box(numbers[start : start + size], width, height, label)
            if box is not None:
                boxes.append(box)
    return boxes


def _box(numbers: Sequence[float], width: int, height: int, label: str) -> Box | None:
    xs = [min(max(number / SCALE, 0.0), 1.0) * width for number in numbers[::2]]
    ys = [min(max(number / SCALE, 0.0), 1.0) * height for number in numbers[1::2]]
    x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    if x1 == x2 or y1 == y2:
        return None
    corners = tuple(zip(xs, ys, strict=True)) if len(xs) == 4 else ()
    return Box(x1=x1, y1=y1, x2=x2, y2=y2, label=label, corners=corners)


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of the picture, RGB, with the boxes outlined in colours of their own and their labels beside them.

    Lines and letters grow with the picture. A label stands above its box, or inside where there is no room.
    """
    drawn = to_rgb(image).copy()
    pen = ImageDraw.Draw(drawn)
    line = max(1, round(min(drawn.size) / 200))
    font = ImageFont.truetype(str(font_path()), max(12, round(min(drawn.size) / 28)))
    for index, box in enumerate(boxes):
        colour = _COLOURS[index % len(_COLOURS)]
        if box.corners:
            pen.line([*box.corners, box.corners[0]], fill=colour, width=line, joint="curve")
        else:
            x, y = int(box.x1), int(box.y1)
            pen.rectangle((x, y, max(x, round(box.x2) - 1), max(y, round(box.y2) - 1)), outline=colour, width=line)
    for index, box in enumerate(boxes):  # above every outline
        if box.label:
            _write(pen, box, _COLOURS[index % len(_COLOURS)], font, line, drawn.size)
    return drawn


def _write(
    pen: ImageDraw.ImageDraw,
    box: Box,
    colour: str,
    font: ImageFont.FreeTypeFont,
    margin: int,
    size: tuple[int, int],
) -> None:
    text = " ".join(box.label.split())
    room, kept = size[0] - 4 * margin, len(text)
    while kept > 1 and pen.textlength(text[:kept], font) > room:
        kept -= max(1, kept // 8)
    text = text if kept == len(text) else f"{text[:kept]}…"
    left, top, right, bottom = pen.textbbox((0, 0), text, font)
    width, height = right - left + 4 * margin, bottom - top + 4 * margin
    x = min(max(box.x1, 0), max(size[0] - width, 0))
    y = box.y1 - height if box.y1 >= height else min(box.y1, max(size[1] - height, 0))
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    ink = "black" if 299 * red + 587 * green + 114 * blue > 140_000 else "white"
    pen.text((x + 2 * margin - left, y + 2 * margin - top), text, ink, font)
