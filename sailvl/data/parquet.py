"""Conversations in Parquet files, as data hubs publish them: pictures inside the table, or paths beside it.

A column store reads a row group at once, so a truly random row costs its whole group. Rows are therefore dealt by
windows: consecutive row groups with about 500 rows together, in a random order of windows and of the rows inside
(``sailvl.data.order``), every row of an epoch once. A process keeps the row groups it used last, ``cache_bytes`` of
them, and reads no others while the order stays inside a window; a sample that waited long to be packed may cost its
group once more. Random order is local: shuffle before writing a table whose rows are sorted by topic.

Opening reads the footers alone: about 1 ms a file. Foreign bytes are parsed by pyarrow (extra ``parquet``) and become
plain values; what it cannot read is a RecordError of each row concerned.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sailvl.data.conversation import COLUMNS, TURNS, to_record
from sailvl.data.pictures import find_file, open_pictures
from sailvl.data.source import files_of
from sailvl.types import Record, RecordError
from sailvl.video import NUM_FRAMES, check_num_frames

WINDOW_ROWS = 500
"""A window is as many row groups as have this many rows, at least one."""

CACHE_BYTES = 256 << 20
"""Of decoded row groups, per process; the newest one is kept whatever its size."""


class ParquetSource:
    """Records from a Parquet file, a folder of them, or a pattern.

    Columns are those of ``sailvl.data.conversation``; others are never read. Paths in them start at image_root
    (default: the folder of the files). Raises RecordError if a file is missing, unreadable or without conversations, or
    if all of them are without rows.
    """

    def __init__(
        self,
        path: Path | str,
        name: str | None = None,
        image_root: Path | str | None = None,
        num_frames: int = NUM_FRAMES,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        check_num_frames(num_frames)
        self.num_frames, self.cache_bytes = num_frames, cache_bytes
        self.paths = files_of(path, ".parquet")
        self.name = name if name is not None else Path(path).stem
        self.image_root = Path(image_root) if image_root is not None else self.paths[0].parent
        self._groups: list[tuple[int, int]] = []  # (file, row group of it)
        sizes, digest = list[int](), hashlib.sha256()
        for number, file in enumerate(self.paths):
            footer, found = _footer(file)
            digest.update(f"{file.name}/{file.stat().st_size}/".encode() + footer)
            self._groups += [(number, group) for group in range(len(found))]
            sizes += found
        self._fingerprint = digest.hexdigest()
        self._starts = [0, *accumulate(sizes)]
        if not self._starts[-1]:
            raise RecordError(f"{path}: no rows in {len(self.paths)} files")
        self.windows: Sequence[int] = _windows(self._starts)
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def fingerprint(self) -> str:
        """SHA-256 of file names, sizes and footers: schema, sizes and statistics of all columns, not their pages."""
        return self._fingerprint

    def record(self, row: int) -> Record:
        """The record of a row, picture sizes read from headers. Raises RecordError or MediaError."""
        group = bisect_right(self._starts, row) - 1
        path, inside = self.paths[self._groups[group][0]], row - self._starts[group]
        where = f"{path} row group {self._groups[group][1]} row {inside}, record {self.name}/{row}"
        try:
            value = self._table(group).slice(inside, 1).to_pylist()[0]
        except (pa.ArrowException, OSError, IndexError, UnicodeDecodeError) as error:
            raise RecordError(f"{where}: unreadable: {type(error).__name__}: {error}") from error
        return to_record(
            value,
            partial(find_file, root=self.image_root),
            id=f"{self.name}/{row}",
            where=where + (f" (id {value['id']!r})" if value.get("id") is not None else ""),
            num_frames=self.num_frames,
            meta={"path": str(path), "row": row},
        )

    def _table(self, group: int) -> pa.Table:
        """A row group, from the cache or read into it; pyarrow raises what it raises."""
        if group not in self._cache:
            number, inside = self._groups[group]
            # opened per read and read by this thread: no handle, position or thread for a fork to copy
            with pq.ParquetFile(self.paths[number]) as file:
                columns = [name for name in COLUMNS if name in file.schema_arrow.names]
                self._cache[group] = file.read_row_group(inside, columns=columns, use_threads=False)
            while len(self._cache) > 1 and sum(table.nbytes for table in self._cache.values()) > self.cache_bytes:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]

    def images(self, record: Record) -> list[Image.Image]:
        """The record's pictures, decoded, each clip once. Raises MediaError naming the file and the record."""
        return open_pictures(record)


def _footer(path: Path) -> tuple[bytes, list[int]]:
    """The footer's bytes, and the rows of each row group."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            length = int.from_bytes(file.read(4), "little")
            file.seek(max(0, size - 8 - length))
            footer = file.read(length)
        with pq.ParquetFile(path) as table:
            names, found = table.schema_arrow.names, table.metadata
            sizes = [found.row_group(group).num_rows for group in range(found.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise RecordError(f"{path}: not a readable Parquet file: {error}") from error
    if not set(names) & set(TURNS):
        raise RecordError(f"{path}: needs a column {', '.join(TURNS[:-1])} or {TURNS[-1]}; it has {', '.join(names)}")
    return footer, sizes


def _windows(starts: Sequence[int]) -> list[int]:
    """First rows of windows: row groups of starts, joined while they have fewer than WINDOW_ROWS rows."""
    windows = [0]
    for start in starts[1:-1]:
        if windows[-1] + WINDOW_ROWS <= start < starts[-1]:
            windows.append(start)
    return windows
