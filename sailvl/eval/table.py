"""Benchmark files as people hold them: the tab-separated tables of VLMEvalKit, its prediction files, pictures included.

A table may weigh gigabytes, nearly all of it base64 pictures, so only the other columns are kept in memory; a row's
pictures are read again from its place in the file when they are asked for. Cells may hold tabs and line ends in quotes,
and megabytes.

**What counts as missing.** Published scores come from tables read by pandas, whose defaults turn texts such as "None",
"NA" or "null" into missing values, columns of whole numbers into integers, and numbers with a gap among them into
floats ("12" becomes "12.0"). That decides scores, so it is repeated here: ``plain=False``. With ``plain=True`` only
empty cells are missing and every cell is text.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from sailvl.files import writing
from sailvl.media import MediaError

Cell: TypeAlias = str | int | float | bool | None
Row: TypeAlias = dict[str, Cell]

MISSING = frozenset(
    "|#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null".split("|")
)
"""Texts that pandas reads as missing (pandas.read_csv, ``na_values``)."""

REFERENCE = 64
"""An image cell of at most this many characters names the row that holds the picture."""

_INTEGER = re.compile(r"\s*[-+]?[0-9]+\s*")
_FLOAT = re.compile(r"\s*[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\s*|\s*[-+]?(?:inf|Inf|INF|infinity)\s*")
_INT64 = 2**63


class TableError(ValueError):
    """A file that is no usable table; the message names it, and the row where there is one."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A benchmark: ``rows`` hold every column but ``image``; index cells are all integers, or all texts.

    ``places``: where rows that hold pictures themselves begin and end in the file, in bytes. ``holders``: such rows by
    the text of their index; ``references``: rows that show another row's picture, and the index they name.
    """

    path: Path
    name: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    places: Mapping[int, tuple[int, int]] = field(default_factory=dict, repr=False)
    holders: Mapping[str, int] = field(default_factory=dict, repr=False)
    references: Mapping[int, str] = field(default_factory=dict, repr=False)
    image_root: Path | None = None


# ---- reading --------------------------------------------------------------------------------------------------


def read(path: Path, *, name: str = "", image_root: Path | None = None, plain: bool = False) -> Table:
    """A benchmark's TSV file. ``name`` is the data set's, by default the file's own without a final ``_local``.

    ``image_root``: where ``image_path`` cells that are not absolute start. Rows whose image cell is empty are dropped,
    as upstream drops them. Raises TableError for files without rows, without an ``index`` column, or with an index
    twice. Indices of RefCOCO begin anew in each split: they become ``SPLIT_INDEX``, as upstream names them.
    """
    name = name or path.stem.removesuffix("_local")
    csv.field_size_limit(sys.maxsize)
    raw: list[dict[str, str]] = []
    places: dict[int, tuple[int, int]] = {}
    holders: dict[str, int] = {}
    references: dict[int, str] = {}
    columns: list[str] = []
    for start, end, cells in _records(path):
        if not columns:
            columns = cells
            if "index" not in columns:
                raise TableError(f"{path}: no column is called 'index' (columns: {', '.join(columns[:12])})")
            if len(set(columns)) < len(columns):
                raise TableError(f"{path}: two columns have one name ({', '.join(columns[:12])})")
            continue
        if len(cells) > len(columns):
            raise TableError(f"{path}: row {len(raw) + 1} has {len(cells)} cells for {len(columns)} columns")
        row = dict(zip(columns, cells + [""] * (len(columns) - len(cells)), strict=True))
        if name == "RefCOCO":
            row |= _within_split(row)
        image = row.pop("image", None)
        if image is not None and _is_missing(image, plain):
            continue
        if image is not None and len(image) > REFERENCE:
            holders[row["index"]] = len(raw)
            places[len(raw)] = (start, end)
        elif image is not None:
            references[len(raw)] = image
        raw.append(row)
    if not raw:
        raise TableError(f"{path}: no rows")
    rows = _typed(raw, plain=plain)
    seen: dict[Cell, int] = {}
    for number, given in enumerate(rows, 1):
        index = given["index"]
        if index is None or index in seen:
            what = "no index" if index is None else f"the index of row {seen[index]} ({index})"
            raise TableError(f"{path}: row {number} has {what}")
        seen[index] = number
    return Table(
        path=path,
        name=name,
        rows=tuple(rows),
        columns=tuple(dict.fromkeys(key for key in (*columns, *raw[0]) if key != "image")),
        places=places,
        holders=holders,
        references=references,
        image_root=image_root,
    )


def _records(path: Path) -> Iterator[tuple[int, int, list[str]]]:
    """First byte, last byte and cells of each record, the header first."""
    end = 0

    def lines(file: Iterable[bytes]) -> Iterator[str]:
        nonlocal end
        for number, line in enumerate(file):
            text = line.decode("utf-8-sig" if number == 0 else "utf-8")
            end += len(line)
            yield text

    try:
        with path.open("rb") as file:
            reader = csv.reader(lines(file), delimiter="\t")
            start = 0
            for cells in reader:
                if cells:
                    yield start, end, cells
                start = end
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(f"{path}: not a readable UTF-8 table ({error})") from error


def _within_split(row: Mapping[str, str]) -> dict[str, str]:
    """The split of a RefCOCO row, from a category such as "RefCOCO+ testA" if it names none, and its index in it."""
    split, index = row.get("split", ""), row["index"]
    if split in MISSING:
        name, _, part = row.get("category", "").strip().partition(" ")
        known = {end.lower(): end for end in ("val", "test", "testA", "testB")}
        plain = re.sub(r"[\s_-]+", "", part.lower())
        split = "_".join(filter(None, (name, known.get(plain, re.sub("[ -]", "_", part.strip()))))) or "RefCOCO"
    return {"split": split, "index": index if index.startswith(f"{split}_") else f"{split}_{index}"}


def _is_missing(text: str, plain: bool) -> bool:
    return text == "" if plain else text in MISSING


def _typed(raw: Sequence[Mapping[str, str]], *, plain: bool) -> list[Row]:
    """Texts as pandas would type them, column by column."""
    rows: list[Row] = [{} for _ in raw]
    columns = dict.fromkeys(key for row in raw for key in row)
    for column in columns:
        texts = [row.get(column, "") for row in raw]
        values = _plain_column(texts) if plain else _column(texts)
        if column == "index":
            # upstream compares indices as texts, and as integers if all are
            whole = all(_INTEGER.fullmatch(text) for text in texts)
            values = [int(text) if whole else (text.strip() or None) for text in texts]
        for row, value in zip(rows, values, strict=True):
            row[column] = value
    return rows


def _plain_column(texts: Sequence[str]) -> list[Cell]:
    return [text or None for text in texts]


def _column(texts: Sequence[str]) -> list[Cell]:
    """One column under pandas' rules: integers, else floats, else booleans, else texts; missing cells are None."""
    there = [text for text in texts if text not in MISSING]
    if there and all(_INTEGER.fullmatch(text) for text in there):
        numbers = [int(text) for text in there]
        if len(there) == len(texts) and all(-_INT64 <= number < _INT64 for number in numbers):
            return list(numbers)
    if there and all(_FLOAT.fullmatch(text) for text in there):
        return [None if text in MISSING else float(text) for text in texts]
    if there and len(there) == len(texts) and all(text in ("True", "False", "TRUE", "FALSE") for text in there):
        return [text.lower() == "true" for text in texts]
    return [None if text in MISSING else text for text in texts]


# ---- pictures -------------------------------------------------------------------------------------------------


def pictures(table: Table, number: int) -> list[bytes | Path]:
    """The encoded pictures of row ``number`` (from 0): bytes from base64 cells, or paths.

    Raises MediaError naming the row for cells that hold neither, references to rows without a picture, and missing
    files.
    """
    row = table.rows[number]
    where = f"{table.path}: row {number + 1} (index {row['index']})"
    cell = _image_cell(table, number, where)
    if cell is not None:
        return [_decode(text, where) for text in as_list(cell)]
    listed = row.get("image_path")
    if listed is None:
        return []
    paths = []
    for text in as_list(str(listed)):
        path = Path(text)
        if not path.is_absolute():
            path = (table.image_root or table.path.parent / "images" / table.name) / path
        if not path.is_file():
            raise MediaError(f"{where}: {path}: no such picture")
        paths.append(path)
    return list(paths)


def _image_cell(table: Table, number: int, where: str) -> str | None:
    """The base64 text of a row's image cell, another row's if it refers to one; None if it has neither."""
    key = table.references.get(number)
    if key is not None:
        if key not in table.holders:
            raise MediaError(f"{where}: its image cell {key!r} names no row with a picture")
        number = table.holders[key]
    if number not in table.places:
        return None
    start, end = table.places[number]
    with table.path.open("rb") as file:
        header = next(csv.reader([file.readline().decode("utf-8-sig")], delimiter="\t"))
        file.seek(start)
        record = file.read(end - start).decode("utf-8")  # cut at line feeds alone: texts hold other ends of lines
    return next(csv.reader([record], delimiter="\t"))[header.index("image")]


def picture_key(table: Table, number: int) -> int:
    """The row whose picture this row shows: rows with one key show the same picture."""
    return table.holders.get(table.references.get(number, ""), number)


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{where}: its picture is not base64 ({error})") from error


def as_list(text: str) -> list[str]:
    """The texts of a list literal, or the text itself as the only one."""
    stripped = text.strip()
    if stripped.startswith("[") and stripped.endswith("]"):
        try:
            found = ast.literal_eval(stripped)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [text]
        if isinstance(found, list):
            return [str(entry) for entry in found]
    return [text]


# ---- predictions ----------------------------------------------------------------------------------------------


def read_predictions(path: Path, *, plain: bool = False) -> list[Row]:
    """Rows of a prediction file: ``.tsv``, ``.xlsx``, ``.json`` (a list of objects) or ``.jsonl``.

    Every row has ``index`` and ``prediction``; further columns are the benchmark's. Raises TableError for other files,
    missing columns, and an index twice.
    """
    if not path.is_file():
        raise TableError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix == ".tsv":
        rows = [dict(row) for row in read(path, plain=plain).rows]
    elif suffix == ".xlsx":
        rows = _typed(_sheet(path), plain=plain)
    elif suffix in (".json", ".jsonl"):
        rows = _objects(path, lines=suffix == ".jsonl")
    else:
        raise TableError(f"{path}: predictions are .tsv, .xlsx, .json or .jsonl files")
    for column in ("index", "prediction"):
        lacking = next((number for number, row in enumerate(rows, 1) if column not in row), None)
        if lacking is not None or not rows:
            raise TableError(f"{path}: row {lacking or 1} has no '{column}'")
    return rows


def _sheet(path: Path) -> list[dict[str, str]]:
    try:
        from openpyxl import load_workbook  # noqa: PLC0415  (an extra, and slow to import)
    except ImportError as error:
        raise TableError(f"{path}: reading .xlsx needs openpyxl: pip install 'sailvl[eval]'") from error
    try:
        sheet = load_workbook(path, read_only=True, data_only=True).active
        if sheet is None:
            raise ValueError("no sheet")
        values = list(sheet.iter_rows(values_only=True))
    except Exception as error:  # openpyxl raises anything at all on damaged files
        raise TableError(f"{path}: not a readable workbook ({error})") from error
    if not values:
        raise TableError(f"{path}: no rows")
    header = ["" if cell is None else str(cell) for cell in values[0]]
    return [
        {name: "" if cell is None else str(cell) for name, cell in zip(header, line, strict=False) if name}
        for line in values[1:]
        if any(cell is not None for cell in line)
    ]


def _objects(path: Path, *, lines: bool) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        found: Any = [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise TableError(f"{path}: predictions must be a list of objects")
    return [dict(row) for row in found]


def write_tsv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write a TSV file in one piece (temporary file, fsync, rename); None becomes an empty cell."""
    with writing(path, errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\r\n")  # else a lone \r in a cell is not quoted
        writer.writerow(columns)
        for row in rows:
            writer.writerow(["" if row.get(column) is None else row[column] for column in columns])
