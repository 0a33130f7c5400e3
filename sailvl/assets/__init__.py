"""The core corpus inside the package: named drawings, tables with known values, lines of text, a font, a tokenizer.

Everything is permissively licensed and was repacked once by ``tools/build_corpus.py`` and ``tools/build_tokenizer.py``;
an item carries where it comes from. The pictures of a source lie in one file of concatenated WebP, found by offset, so
that an installed package is a dozen files and a forked worker can read without sharing a file handle.

The split is by *concept*, not by picture: two styles of one emoji, an icon of the same name and the flag of one country
are never on both sides. It depends on the concept's name alone (first 8 bytes of its sha256, modulo 100).

Cost: the index is read on first use (about 0.1 s); nothing is read on import. No torch.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from PIL import Image

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

CATEGORIES: Mapping[str, str] = MappingProxyType(
    {
        "animal": "动物", "body": "身体部位", "building": "建筑", "clothing": "服饰", "device": "电子设备",
        "drink": "饮料", "face": "表情", "flag": "旗帜", "food": "食物", "household": "家居用品", "money": "钱币",
        "music": "音乐", "person": "人物", "place": "地理景观", "plant": "植物", "sport": "运动", "stationery": "文具",
        "symbol": "符号", "tool": "工具", "vehicle": "交通工具", "weather": "天气",
    }
)  # fmt: skip
"""Kinds of things, English -> Chinese. An item whose kind is not clear from its source has none."""

_ROOT = Path(__file__).resolve().parent
_CORPUS = _ROOT / "corpus"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One drawing. Sizes in pixels; ``source`` is a key of ``packages()``; ``path`` is its path in that package.

    ``facts`` of a flag are the country's capital and continent, in English. ``offset``
    and ``size`` are bytes in the source's picture file; ``sha256`` is of the stored WebP bytes.
    """

    id: str
    concept: str
    split: Split
    kind: Literal["emoji", "flag", "icon", "clipart"]
    name_en: str
    source: str
    path: str
    licence: str
    width: int
    height: int
    offset: int
    size: int
    sha256: str
    name_zh: str | None = None
    category: str | None = None
    keywords_en: tuple[str, ...] = ()
    keywords_zh: tuple[str, ...] = ()
    description: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict, hash=False)
    author: str | None = None

    @property
    def package(self) -> str:
        """Registry, name and version of the package the drawing was taken from."""
        return str(packages()[self.source]["package"])


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows with known values, for charts and look-ups. Every row has one value (str, int, float, None) per column."""

    name: str
    split: Split
    title_en: str
    title_zh: str
    columns: tuple[str, ...]
    columns_zh: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    source: str
    path: str
    licence: str
    credit: str


def hash64(text: str) -> int:
    """First 8 bytes of the sha256 of ``text``, big endian."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(concept: str) -> Split:
    """The split a concept (or any other name that must not leak) belongs to: 90 % / 5 % / 5 %."""
    bucket = hash64(concept) % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


@cache
def packages() -> Mapping[str, Mapping[str, str]]:
    """Source name -> package (with version), sha256 of the download, licence, credit."""
    return MappingProxyType(json.loads((_CORPUS / "packages.json").read_text(encoding="utf-8")))


@cache
def _all_items() -> tuple[Item, ...]:
    lists = ("keywords_en", "keywords_zh")
    found = []
    with (_CORPUS / "items.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            row.update({key: tuple(row[key]) for key in lists if key in row})
            found.append(Item(**row))
    return tuple(found)


@cache
def _selected(split: str | None, kind: str | None) -> tuple[Item, ...]:
    return tuple(i for i in _all_items() if split in (None, i.split) and kind in (None, i.kind))


def items(split: Split | None = None, kind: str | None = None) -> list[Item]:
    """Drawings in a fixed order, of one split and one kind if given. ValueError for an unknown split or kind."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    kinds = {item.kind for item in _all_items()}
    if kind is not None and kind not in kinds:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(sorted(kinds))}")
    return list(_selected(split, kind))


def splits() -> dict[str, Split]:
    """Concept -> split, for every concept that has a drawing."""
    return {item.concept: item.split for item in _all_items()}


@cache
def _by_id() -> Mapping[str, Item]:
    return {item.id: item for item in _all_items()}


def item(item_id: str) -> Item:
    """The drawing of that id. KeyError if there is none."""
    return _by_id()[item_id]


def sprite_bytes(item: Item) -> bytes:
    """The stored WebP file of a drawing."""
    with (_CORPUS / f"{item.source}.bin").open("rb") as file:
        file.seek(item.offset)
        return file.read(item.size)


def sprite(item: Item) -> Image.Image:
    """The drawing as RGBA, its transparent border already trimmed; compose it on any background."""
    return Image.open(io.BytesIO(sprite_bytes(item))).convert("RGBA")


@cache
def _all_tables() -> tuple[Table, ...]:
    found = []
    for row in json.loads((_CORPUS / "tables.json").read_text(encoding="utf-8")):
        row.update({key: tuple(row[key]) for key in ("columns", "columns_zh")})
        row["rows"] = tuple(tuple(values) for values in row["rows"])
        found.append(Table(**row))
    return tuple(found)


def tables(split: Split | None = None) -> list[Table]:
    """Tables in a fixed order, of one split if given. ValueError for an unknown split."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    return [table for table in _all_tables() if split in (None, table.split)]


@cache
def _all_lines() -> tuple[tuple[str, str, str], ...]:
    with (_CORPUS / "lines.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return tuple((row["split"], row["lang"], row["text"]) for row in rows)


def lines(split: Split, lang: Literal["en", "zh"]) -> list[str]:
    """Short lines of text to draw and read: word definitions (en), verse (zh). A poem is in one split as a whole."""
    if split not in SPLITS or lang not in ("en", "zh"):
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}, or lang {lang!r} is not 'en' or 'zh'")
    return [text for its_split, its_lang, text in _all_lines() if (its_split, its_lang) == (split, lang)]


def tokenizer_path() -> Path:
    """The nano tokenizer's ``tokenizer.json`` (8,192 ids); ``tokenizer_config.json`` lies beside it."""
    return _ROOT / "tokenizer" / "tokenizer.json"


def font_path() -> Path:
    """A TrueType font with Latin letters and the ~3,000 most frequent Chinese characters (Apache-2.0)."""
    return _ROOT / "corpus" / "font.ttf"
