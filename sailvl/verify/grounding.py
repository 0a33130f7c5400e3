"""Does a box that an answer names cover the true one? Coordinates are thousandths of the picture's width and height.

The report grounds with ``<box>[[x1,y1,x2,y2]]</box>`` in 0-1000; the tags may be missing, because they are special
tokens that a decoder may drop. Anything but exactly one well-formed box is wrong.
"""

from __future__ import annotations

import re
import unicodedata

from sailvl.verify.boxes import Box, box_iou

_NUMBER = r"[0-9]{1,4}(?:\.[0-9]{1,6})?"
_BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([f"({_NUMBER})"] * 4) + r"\s*\]")
_ANY_NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?")


def iou(answer: str, truth: str) -> float:
    """1 if intersection over union is at least one half, else 0. Raises ValueError if the truth holds no box."""
    wanted = box(truth)
    if wanted is None:
        raise ValueError(f"the truth {truth!r} holds no box [[x1,y1,x2,y2]] with x1 < x2 and y1 < y2 in 0-1000")
    given = box(answer)
    return float(given is not None and box_iou(given, wanted) >= 0.5)


def box(text: str) -> Box | None:
    """The one box of a text (x1, y1, x2, y2), or None: none, several, empty, reversed or outside 0-1000."""
    text = unicodedata.normalize("NFKC", text)
    found = _BOX.findall(text)
    if len(found) > 1 or (not found and ("[" in text or len(_ANY_NUMBER.findall(text)) != 4)):
        return None
    left, top, right, bottom = map(float, found[0] if found else _ANY_NUMBER.findall(text))
    if not (0 <= left < right <= 1000 and 0 <= top < bottom <= 1000):
        return None
    return left, top, right, bottom
