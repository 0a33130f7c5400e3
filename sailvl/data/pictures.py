"""From what a row says of a picture or clip to its size, and later to pixels.

A reference is a path, the bytes of a file, or {"bytes": ..., "path": ...}; a ``Find`` makes a path or bytes of it.
Sizes come from headers alone. Every error names the record, and the file if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from sailvl.media import image_size, open_image
from sailvl.types import Picture, Record, RecordError
from sailvl.video import video_frames, video_size

Kind = Literal["image", "video"]
Find = Callable[[Any, Kind, str], str | bytes]
"""(reference, kind, where) -> a path, or the bytes of a file. Raises RecordError beginning with ``where``."""


@dataclass(frozen=True, kw_only=True)
class ClipFrame:
    """Frame ``index`` of the ``num_frames`` that are taken of the clip, a path or the bytes of a file."""

    path: str | bytes
    num_frames: int
    index: int


def find_file(ref: Any, kind: Kind, where: str, root: Path) -> str | bytes:
    """A ``Find`` for files: bytes as they are, relative paths below root, absolute ones as they are."""
    if isinstance(ref, Mapping):
        ref = ref["path"] if ref.get("bytes") is None else ref["bytes"]
    if isinstance(ref, bytes):
        return ref
    if "://" in ref or ref.startswith("data:"):
        raise RecordError(f"{where}: {kind} {ref[:80]!r} is a URL; nothing is fetched: download it first")
    path = Path(ref)
    if not path.is_absolute():
        path = root / path
        if not path.resolve().is_relative_to(root.resolve()):
            raise RecordError(f"{where}: {kind} {ref!r} is outside {root}: set image_root")
    return str(path)


def open_pictures(record: Record) -> list[Image.Image]:
    """The record's pictures, decoded, each clip once. Raises MediaError naming the file and the record."""
    clips: dict[tuple[str | bytes, int], list[Image.Image]] = {}
    images = []
    for picture in record.pictures:
        ref = picture.ref
        if not isinstance(ref, ClipFrame):
            images.append(open_image(ref, name=f"record {record.id}, image {shown(ref)}"))
            continue
        key = ref.path, ref.num_frames
        if key not in clips:
            name = f"record {record.id}, video {shown(ref.path)}"
            clips[key] = video_frames(ref.path, ref.num_frames, name=name)
        images.append(clips[key][ref.index])
    return images


def shown(found: str | bytes) -> str:
    """How errors call it."""
    return found if isinstance(found, str) else f"of {len(found)} bytes"


def to_picture(ref: Any, find: Find, where: str, *, frame: bool = False) -> Picture:
    """A still picture, or a single frame of a clip, of the size its header says. Raises RecordError or MediaError."""
    found = find(ref, "image", where)
    width, height = image_size(found, name=f"{where}, image {shown(found)}")
    return Picture(width=width, height=height, ref=found, frame=frame)


def to_frames(ref: Any, find: Find, count: int, where: str) -> list[Picture]:
    """The ``count`` frames that are taken of a clip. Raises RecordError or MediaError."""
    found = find(ref, "video", where)
    size = video_size(found, name=f"{where}, video {shown(found)}")
    refs = [ClipFrame(path=found, num_frames=count, index=index) for index in range(count)]
    return [Picture(width=size.width, height=size.height, ref=ref, frame=True) for ref in refs]
