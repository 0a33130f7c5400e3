"""Where samples come from: a protocol of five members, and JSON lines on disk.

A source gives a record by row number, cheaply and without decoding a pixel (the planner only needs texts and picture
sizes), and decodes a record's pictures when asked (a worker's job). It holds no position: order and resume belong to
``sailvl.data.order``, so a source can be read in any order, by any number of processes.

``JsonlSource`` reads one JSON object a line, in the forms of ``sailvl.data.conversation``, with pictures and clips as
paths. Opening it reads the file once: it notes where each line starts (16 B a row), makes ids unique and hashes the
content, about 10 s a GB. Rows are then read at random, 20 us each, plus a header (30 us) per picture or 5 ms per clip.
Tables and archives are in ``sailvl.data.parquet`` and ``sailvl.data.webdataset``.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image

from sailvl.data.conversation import to_record
from sailvl.data.pictures import find_file, open_pictures
from sailvl.types import Record, RecordError
from sailvl.video import NUM_FRAMES, check_num_frames


class Source(Protocol):
    """Rows of records. Implementations must survive a fork and be safe to read from several processes."""

    name: str

    def __len__(self) -> int:
        """Number of rows."""

    def record(self, row: int) -> Record:
        """The record, nothing decoded. Raises RecordError or MediaError if it is broken."""

    def images(self, record: Record) -> list[Image.Image]:
        """The record's pictures, decoded, in order. Raises MediaError."""

    def fingerprint(self) -> str:
        """A hash of the content: a run resumes only on the data it began with."""


@runtime_checkable
class Windowed(Protocol):
    """A source whose rows are cheap in groups only: the order takes its rows window by window."""

    windows: Sequence[int]
    """The first row of each window, ascending from 0."""


def files_of(path: Path | str, suffix: str) -> list[Path]:
    """A file, the ``*suffix`` files of a folder, or those of a pattern (``shards/train-*.tar``), sorted by name.

    Raises RecordError if there is none, or a single file has another suffix.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob(f"*{suffix}"))
    elif "*" in path.name or "?" in path.name:
        found = sorted(path.parent.glob(path.name))
    else:
        found = [path]
    if not found:
        raise RecordError(f"{path}: no {suffix} files here")
    if wrong := [file.name for file in found if file.suffix != suffix]:
        raise RecordError(f"{path}: {wrong[0]} is not a {suffix} file ({len(wrong)} such of {len(found)})")
    return found


class JsonlSource:
    """Records from a JSON lines file; pictures and clips from files beside it.

    image_root: where relative picture paths start (default: the file's folder). A relative path must stay below it; an
    absolute path is taken as it is. num_frames: taken of a clip where the record has no ``num_frames`` of its own.
    Raises RecordError if the file is missing, unreadable or without a row.
    """

    def __init__(
        self,
        path: Path | str,
        name: str | None = None,
        image_root: Path | str | None = None,
        num_frames: int = NUM_FRAMES,
    ) -> None:
        check_num_frames(num_frames)
        self.num_frames = num_frames
        self.path = Path(path)
        self.name = name if name is not None else self.path.stem
        self.image_root = Path(image_root) if image_root is not None else self.path.parent
        self._offsets, self._lines = array("q"), array("q")
        self._renamed: set[int] = set()
        digest, seen = hashlib.sha256(), set[str]()
        try:
            with self.path.open("rb") as file:
                offset = 0
                for number, line in enumerate(file, 1):
                    digest.update(line)
                    if line.strip():
                        self._note(line, offset, number, seen)
                    offset += len(line)
        except OSError as error:
            raise RecordError(f"{self.path}: {error.strerror or error}") from error
        if not self._offsets:
            raise RecordError(f"{self.path}: no rows; expected one JSON object a line")
        self._fingerprint = digest.hexdigest()

    def _note(self, line: bytes, offset: int, number: int, seen: set[str]) -> None:
        row = len(self._offsets)
        self._offsets.append(offset)
        self._lines.append(number)
        try:
            given = json.loads(line.decode("utf-8-sig")).get("id")
        except (ValueError, AttributeError, RecursionError):
            return  # reported, with its line number, when the row is drawn
        if given is None:
            return
        # an id used before, or one that could be another row's fallback, gives way to the fallback
        if str(given) in seen or str(given).startswith(f"{self.name}/"):
            self._renamed.add(row)
        seen.add(str(given))

    def __len__(self) -> int:
        return len(self._offsets)

    def fingerprint(self) -> str:
        """SHA-256 of the file's bytes (not of the pictures')."""
        return self._fingerprint

    def record(self, row: int) -> Record:
        """The record of a row, picture sizes read from the files' headers. Raises RecordError or MediaError."""
        where = f"{self.path} line {self._lines[row]}"
        with self.path.open("rb") as file:  # opened per read: a shared handle would share its position after a fork
            file.seek(self._offsets[row])
            line = file.readline()
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{where}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise RecordError(f"{where}: a JSON object is expected, this is a {type(value).__name__}")
        given = value.get("id")
        id = f"{self.name}/{row}" if given is None or row in self._renamed else str(given)
        return to_record(
            value,
            partial(find_file, root=self.image_root),
            id=id,
            where=f"{where}, record {id}",
            num_frames=self.num_frames,
            meta={"path": str(self.path), "row": row},
        )

    def images(self, record: Record) -> list[Image.Image]:
        """The record's pictures, decoded, each clip once. Raises MediaError naming the file and the record."""
        return open_pictures(record)
