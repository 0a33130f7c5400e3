"""Samples in plain tar shards, as WebDataset writes them, read at random and resumed exactly.

Members that follow each other and share a key (the name up to the first dot of its last part) are one sample: ``json``
holds the row in the forms of ``sailvl.data.conversation``; or ``txt`` holds a caption, and the question is ``prompt``.
Pictures (``jpg``, ``png``, ``webp`` ...) and clips (``mp4`` ...) are shown in the order of the archive, unless the json
lists them by name or ending. A sample's members lie side by side, so a sample is one read at an offset.

Opening scans the shards' headers and texts once (about 60 us a sample) and keeps 20 B a sample; with ``cache`` that
index is stored in a folder of the caller's choice, never beside the shards, and used again while names, sizes and times
of all shards are the same. A random row then costs about 0.1 ms, in true random order: no window, no shuffle buffer.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sailvl.data.conversation import TURNS, brings_own, to_record
from sailvl.data.pictures import Kind, open_pictures
from sailvl.data.source import files_of
from sailvl.data.tar import members
from sailvl.files import writing
from sailvl.types import Record, RecordError
from sailvl.video import NUM_FRAMES, check_num_frames

_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_ENDINGS: Mapping[Kind, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif"),
    "video": ("mp4", "webm", "avi", "mov", "mkv"),
}
_INDEX_VERSION = 1


class WebDatasetSource:
    """Records from a tar shard, a folder of them, or a pattern (``train-*.tar``).

    prompt: what the user asks about a picture that has a caption only (empty: the picture alone). cache: a folder for
    the index. Raises RecordError if a shard is missing, unreadable, compressed or damaged, or there is no sample.
    """

    def __init__(
        self,
        path: Path | str,
        name: str | None = None,
        prompt: str = "",
        num_frames: int = NUM_FRAMES,
        cache: Path | None = None,
    ) -> None:
        check_num_frames(num_frames)
        self.prompt, self.num_frames = prompt, num_frames
        self.paths = files_of(path, ".tar")
        self.name = name if name is not None else Path(path).stem
        try:
            state = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in self.paths]
        except OSError as error:
            raise RecordError(f"{error.filename}: {error.strerror}") from error
        stored = None
        if cache is not None:
            digest = hashlib.sha256(json.dumps([_INDEX_VERSION, state]).encode()).hexdigest()
            stored = cache / f"webdataset-{digest[:32]}.npz"
        index = _stored(stored) if stored else None
        if index is None:
            index = _scan(self.paths)
            if stored:
                _store(stored, index)
        self._shards, self._starts, self._sizes = index["shards"], index["starts"], index["sizes"]
        self._fingerprint = str(index["fingerprint"])
        if not len(self._starts):
            raise RecordError(f"{path}: no sample in {len(self.paths)} shards (a member's name is KEY.ENDING)")

    def __len__(self) -> int:
        return len(self._starts)

    def fingerprint(self) -> str:
        """SHA-256 of all members' names and sizes and the contents of json and txt (not of pictures)."""
        return self._fingerprint

    def record(self, row: int) -> Record:
        """The record of a row, picture sizes read from headers. Raises RecordError or MediaError."""
        path = self.paths[self._shards[row]]
        where = f"{path}, record {self.name}/{row}"
        start, size = int(self._starts[row]), int(self._sizes[row])
        try:
            with path.open("rb") as file:  # opened per read: a shared handle would share its position after a fork
                file.seek(start)
                data = file.read(size)
        except OSError as error:
            raise RecordError(f"{where}: {error}") from error
        key, found = _sample(data, where)
        where = f"{path} sample {key}, record {self.name}/{row}"
        if len(data) < size:
            raise RecordError(f"{where}: cut short: {len(data)} of {size} bytes")
        return to_record(
            self._row(found, where),
            partial(_find, found=found, key=key),
            id=f"{self.name}/{row}",
            where=where,
            num_frames=self.num_frames,
            meta={"path": str(path), "row": row, "key": key},
        )

    def _row(self, found: Mapping[str, bytes], where: str) -> dict[str, Any]:
        """What the sample says, in a row's form; its members are listed unless it lists them itself."""
        row: dict[str, Any] = {}
        try:
            if "json" in found:
                row = json.loads(found["json"].decode("utf-8-sig"))
            if not isinstance(row, dict):
                raise RecordError(f"{where}: json: an object is expected, this is a {type(row).__name__}")
            if not any(row.get(key) is not None for key in TURNS) and "txt" in found:
                said = [("user", self.prompt), ("assistant", found["txt"].decode("utf-8-sig").strip())]
                row = {"caption": True, "messages": [{"role": role, "content": text} for role, text in said]}
        except (ValueError, RecursionError) as error:
            if isinstance(error, RecordError):
                raise
            raise RecordError(f"{where}: json or txt: {type(error).__name__}: {error}") from error
        for kind, endings in _ENDINGS.items():
            if row.get(kind) is None and row.get(f"{kind}s") is None and not brings_own(row, kind):
                row[f"{kind}s"] = [name for name in found if name.rpartition(".")[2] in endings] or None
        if "caption" in row and not row["images"] and not row["videos"]:
            raise RecordError(f"{where}: a caption without a picture; members are {', '.join(found)}")
        return row

    def images(self, record: Record) -> list[Image.Image]:
        """The record's pictures, decoded, each clip once. Raises MediaError naming the record."""
        return open_pictures(record)


def _find(ref: Any, kind: Kind, where: str, *, found: Mapping[str, bytes], key: str) -> str | bytes:
    """A member by its ending, its name, or (if the sample has one of this kind) any name at all."""
    name = ref["path"] if isinstance(ref, Mapping) else ref  # bytes: json holds none
    if "://" in name:
        raise RecordError(f"{where}: {kind} {name[:80]!r} is a URL; nothing is fetched: put it into the shard")
    for named in (name, name.removeprefix(f"{key}."), name.removeprefix(f"{key.rpartition('/')[2]}.")):
        if named.lower() in found:
            return found[named.lower()]
    alike = [ending for ending in found if ending.rpartition(".")[2] in _ENDINGS[kind]]
    if len(alike) == 1:
        return found[alike[0]]
    raise RecordError(f"{where}: {kind} {name!r} is not among the sample's members {', '.join(found)}")


# ---- the index ----------------------------------------------------------------------------------------------------


def _split(name: str) -> tuple[str, str] | None:
    """(key, ending) of a member; None for one that belongs to no sample."""
    parts = _KEY.fullmatch(name)
    return (parts[1], parts[2].lower()) if parts else None


def _sample(data: bytes, where: str) -> tuple[str, dict[str, bytes]]:
    """The key, and the members by ending."""
    key, found = "", dict[str, bytes]()
    for member in members(io.BytesIO(data), where):
        split = _split(member.name)
        if split is None:
            continue
        key, ending = split
        if ending in found:
            raise RecordError(f"{where}: two members {member.name}")
        found[ending] = data[member.data : member.data + member.size]
    return key, found


def _scan(paths: list[Path]) -> dict[str, Any]:
    """Shard, offset and bytes of every sample, and the fingerprint."""
    shards, starts, sizes = list[int](), list[int](), list[int]()
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
        digest.update(f"shard {path.name}\n".encode("utf-8", "surrogateescape"))
        last = None
        try:
            with path.open("rb") as file:
                for member in members(file, str(path)):
                    digest.update(f"{member.name}\n{member.size}\n".encode("utf-8", "surrogateescape"))
                    split = _split(member.name)
                    if split is None:
                        last = None
                        continue
                    if split[1] in ("json", "txt"):
                        file.seek(member.data)
                        digest.update(file.read(member.size))
                    if split[0] != last:
                        shards.append(number)
                        starts.append(member.start)
                        sizes.append(0)
                        last = split[0]
                    sizes[-1] = member.end - starts[-1]
        except OSError as error:
            raise RecordError(f"{path}: {error.strerror or error}") from error
    return {
        "shards": np.array(shards, np.int32),
        "starts": np.array(starts, np.int64),
        "sizes": np.array(sizes, np.int64),
        "fingerprint": np.array(digest.hexdigest()),
    }


def _stored(path: Path) -> dict[str, Any] | None:
    """A stored index; None if there is none, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            index: dict[str, Any] = {key: file[key] for key in ("shards", "starts", "sizes", "fingerprint")}
            return index
    except Exception:  # noqa: BLE001  (any damage: it is made anew)
        return None


def _store(path: Path, index: Mapping[str, Any]) -> None:
    """Write it whole or not at all; several processes may, each its own temporary file."""
    with writing(path, "wb") as file:
        np.savez(file, **index)
