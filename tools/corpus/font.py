"""One small font for drawing text: Latin, punctuation, arrows and the Chinese characters of everyday use.

WenQuanYi Micro Hei (Apache-2.0) cut to Basic Latin and Latin-1, common punctuation and signs, level 1 of GB 2312 (the
3,755 characters of general use) and every character of the corpus' own Chinese names and lines.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from corpus.packages import members
from fontTools import subset
from fontTools.ttLib import TTFont

_PATH = "./usr/share/fonts/truetype/wqy/wqy-microhei.ttc"


def characters(texts: Iterable[str]) -> set[int]:
    """Code points the font must hold."""
    level1 = (bytes((high, low)) for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF))
    found = {ord(char) for pair in level1 for char in pair.decode("gb2312", errors="ignore")}
    found |= {*range(0x20, 0x7F), *range(0xA0, 0x180), *range(0x2190, 0x219A), *range(0x25A0, 0x25D0)}
    found |= {*range(0x3000, 0x3020), *range(0xFF01, 0xFF5F), *map(ord, "–—‘’“”•…‰€℃№×÷≤≥≠≈√∞π°±²³½¼")}
    return found | {ord(char) for text in texts for char in text}


def build(folder: Path, texts: Iterable[str]) -> bytes:
    """The subset as a TrueType file without hinting; the same bytes every time."""
    font = TTFont(io.BytesIO(members(folder, "microhei", _PATH.__eq__)[_PATH]), fontNumber=0, recalcTimestamp=False)
    options = subset.Options(
        hinting=False, layout_features=["kern"], notdef_outline=True, name_IDs=[0, 1, 2, 3, 4, 5, 6]
    )
    options.drop_tables += ["FFTM"]  # the editor's time stamp
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=characters(texts))
    cutter.subset(font)
    buffer = io.BytesIO()
    font.save(buffer)
    return buffer.getvalue()
