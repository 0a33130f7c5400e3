"""Keep a question's pictures as one small file, under a name that is safe whatever the question is called."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

MAX_SIDE = 448
"""Kept pictures are shrunk to this many pixels on the longer side."""


def picture_name(name: str) -> str:
    """A file name for a question's picture; an id that is no plain name is hashed, so that it stays in its folder."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", name):
        name = hashlib.sha256(name.encode()).hexdigest()[:24]
    return f"{name}.png"


def keep(pictures: Sequence[Image.Image], path: Path) -> None:
    """Write a question's pictures side by side as one small PNG."""
    pictures = [picture.convert("RGB") for picture in pictures]
    gap = 4
    sheet = Image.new("RGB", (sum(p.width + gap for p in pictures) - gap, max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    sheet.thumbnail((MAX_SIDE, MAX_SIDE))
    path.parent.mkdir(exist_ok=True)
    sheet.save(path, optimize=True)
