"""Does a reply's box cover the true one? The public rule of RefCOCO, RefCOCO+ and RefCOCOg, for any coordinates.

A reply may give fractions, thousandths or pixels; which it is follows from the largest number. That is a guess, and the
published one: pixels of a picture up to 1000 wide are taken for thousandths. The synthetic families have a rule
without guesses, in ``grounding``.
"""

from __future__ import annotations

import math
import re

Box = tuple[float, float, float, float]

_NUMBER = r"[-+]?(?:\d++(?:\.\d++)?+|\.\d++)(?:[eE][-+]?\d++)?+"
_BETWEEN = r"(?:\s*+,\s*+|\s++)"
_BRACKETED = re.compile(rf"\[\s*+({_NUMBER}){_BETWEEN}({_NUMBER}){_BETWEEN}({_NUMBER}){_BETWEEN}({_NUMBER})\s*+\]")
_ANY = re.compile(_NUMBER)


def four_numbers(reply: str) -> Box | None:
    """The first ``[a, b, c, d]`` (commas or spaces between), else the first four numbers anywhere, else None."""
    found = _BRACKETED.search(reply)
    texts = list(found.groups()) if found else []
    if not texts:
        for number in _ANY.finditer(reply):
            texts.append(number[0])
            if len(texts) == 4:
                break
    if len(texts) < 4:
        return None
    left, top, right, bottom = map(float, texts)
    return left, top, right, bottom


def to_pixels(numbers: Box, width: float, height: float) -> Box | None:
    """The box in pixels, inside the picture, corners ordered; None for a picture without a size.

    Numbers up to 1.5 are fractions, up to 1000 thousandths, larger ones pixels.
    """
    if any(math.isnan(number) for number in numbers) or not (width > 0 and height > 0):
        return None
    largest = max(map(abs, numbers))
    if largest <= 1.5:
        scaled = [number * side for number, side in zip(numbers, (width, height) * 2, strict=True)]
    elif largest <= 1000:
        scaled = [number / 1000 * side for number, side in zip(numbers, (width, height) * 2, strict=True)]
    else:
        scaled = list(numbers)
    x1, y1, x2, y2 = (min(max(value, 0.0), side) for value, side in zip(scaled, (width, height) * 2, strict=True))
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def box_iou(one: Box, other: Box) -> float:
    """Intersection over union in [0, 1]; 0 for boxes that only touch, or are empty."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if not (width > 0 and height > 0):
        return 0.0
    union = sum(max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in (one, other)) - width * height
    return width * height / union if union > 0 else 0.0
