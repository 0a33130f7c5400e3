"""Drawing: a picture is a list of shapes, sprites and text, as values, and one function turns it into pixels.

Being values, pictures can be planned (sizes are known), sent to a worker and compared before anything is drawn.
Drawing one 112-pixel picture takes about a third of a millisecond, so nothing is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from sailvl import assets

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Shape:
    """A filled rectangle or ellipse; ``box`` is left, top, right, bottom in pixels."""

    box: Box
    fill: Colour
    ellipse: bool = False


@dataclass(frozen=True)
class Sprite:
    """An item of the corpus, trimmed to its visible part and fitted into ``size`` pixels around its centre."""

    item: str
    centre: tuple[float, float]
    size: int


@dataclass(frozen=True)
class Text:
    """A line of text around its centre, letters ``size`` pixels high."""

    text: str
    centre: tuple[float, float]
    size: int
    fill: Colour


@dataclass(frozen=True)
class Drawing:
    """A whole picture, sizes in pixels."""

    width: int
    height: int
    background: Colour
    parts: tuple[Shape | Sprite | Text, ...]


@functools.lru_cache(maxsize=8192)
def _sprite(item: str, size: int) -> Image.Image:
    image = assets.sprite(assets.item(item))
    visible = image.getchannel("A").getbbox()
    image = image.crop(visible) if visible else image
    scale = size / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX)


@functools.lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(assets.font_path()), size)


def sprite_box(sprite: Sprite) -> Box:
    """Left, top, right, bottom of the visible part, in pixels."""
    width, height = _sprite(sprite.item, sprite.size).size
    left, top = round(sprite.centre[0] - width / 2), round(sprite.centre[1] - height / 2)
    return left, top, left + width, top + height


def draw(drawing: Drawing) -> Image.Image:
    """The picture, RGB. Later parts cover earlier ones."""
    image = Image.new("RGB", (drawing.width, drawing.height), drawing.background)
    pen = ImageDraw.Draw(image)
    for part in drawing.parts:
        match part:
            case Shape():
                (pen.ellipse if part.ellipse else pen.rectangle)(part.box, fill=part.fill)
            case Sprite():
                left, top, _, _ = sprite_box(part)
                pixels = _sprite(part.item, part.size)
                image.paste(pixels, (int(left), int(top)), pixels)
            case Text():
                pen.text(part.centre, part.text, fill=part.fill, font=_font(part.size), anchor="mm")
    return image


def box_text(box: Sequence[float], width: int, height: int) -> str:
    """The report's grounding format: integers 0-1000 of the picture's width and height."""
    numbers = [round(1000 * value / size) for value, size in zip(box, (width, height, width, height), strict=True)]
    return "<box>[[" + ",".join(str(min(1000, max(0, number))) for number in numbers) + "]]</box>"
