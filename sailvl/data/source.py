"""Where samples come from: a protocol of five members, and JSON lines on disk.

A source gives a record by row number, cheaply and without decoding a pixel (the planner only needs texts and picture
sizes), and decodes a record's pictures when asked (a worker's job). It holds no position: order and resume belong to
``sailvl.data.order``, so a source can be read in any order, by any number of processes.

``JsonlSource`` reads what is usual in the field: one JSON object a line, with ``messages`` (role, content or text) or
``conversations`` (from, value), ``images`` (or ``image``) and ``videos`` (or ``video``) as paths, and ``frames`` as
lists of paths, a list a clip. ``<image>`` and ``<video>`` in the texts say where they go; a clip becomes ``num_frames``
pictures whatever its length, so that a plan needs its header alone.
Opening it reads the file once: it notes where each line starts (16 B a row), makes ids unique and hashes the content,
about 10 s a GB. Rows are then read at random, 20 us each, plus a header (30 us) per picture or 5 ms per clip.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from sailvl.media import image_size, open_image
from sailvl.types import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Message, Picture, Record, RecordError
from sailvl.video import NUM_FRAMES, check_num_frames, video_frames, video_size

_ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip

_PLACEHOLDER = re.compile(f"{re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)}")


@dataclass(frozen=True, kw_only=True)
class ClipFrame:
    """Frame ``index`` of the ``num_frames`` that are taken of the clip at ``path``."""

    path: str
    num_frames: int
    index: int


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
        where = f"{where}, record {id}"
        messages = [_message(turn, where) for turn in _turns(value, where)]
        stills = [self._picture(ref, where) for ref in _refs(value, ("images", "image"), where)]
        clips = self._clips(value, where)
        if clips is None:
            pictures = stills
        else:
            messages, pictures = _placed(messages, stills, clips, where)
        meta = {"path": str(self.path), "row": row}
        return Record(id=id, messages=tuple(messages), pictures=tuple(pictures), meta=meta)

    def _clips(self, value: Mapping[str, Any], where: str) -> list[list[Picture]] | None:
        """The frames of each clip, videos before lists of frames; None if the record has neither."""
        if not {"videos", "video", "frames"} & value.keys():
            return None
        count = value.get("num_frames", self.num_frames)
        try:
            check_num_frames(count)
        except ValueError as error:
            raise RecordError(f"{where}: {error}") from error
        lists = value.get("frames")
        lists = [] if lists is None else lists
        if not isinstance(lists, list) or not all(isinstance(refs, list) and refs for refs in lists):
            raise RecordError(f"{where}: 'frames' must be a list of clips, each a list of file paths")
        clips = [self._video(ref, count, where) for ref in _refs(value, ("videos", "video"), where)]
        for refs in lists:
            paths = _refs({"frames": refs}, ("frames",), where)
            clips.append([self._picture(ref, where, frame=True) for ref in paths])
        return clips

    def _path(self, ref: str, where: str, kind: str) -> Path:
        if "://" in ref or ref.startswith("data:"):
            raise RecordError(f"{where}: {kind} {ref[:80]!r} is a URL; nothing is fetched: download it first")
        path = Path(ref)
        if not path.is_absolute():
            path = self.image_root / path
            if not path.resolve().is_relative_to(self.image_root.resolve()):
                raise RecordError(f"{where}: {kind} {ref!r} is outside {self.image_root}: set image_root")
        return path

    def _picture(self, ref: str, where: str, *, frame: bool = False) -> Picture:
        path = self._path(ref, where, "image")
        width, height = image_size(path, name=f"{where}, image {path}")
        return Picture(width=width, height=height, ref=str(path), frame=frame)

    def _video(self, ref: str, count: int, where: str) -> list[Picture]:
        path = self._path(ref, where, "video")
        size = video_size(path, name=f"{where}, video {path}")
        refs = [ClipFrame(path=str(path), num_frames=count, index=index) for index in range(count)]
        return [Picture(width=size.width, height=size.height, ref=ref, frame=True) for ref in refs]

    def images(self, record: Record) -> list[Image.Image]:
        """The record's pictures, decoded, each clip once. Raises MediaError naming the file and the record."""
        clips: dict[tuple[str, int], list[Image.Image]] = {}
        images = []
        for picture in record.pictures:
            ref = picture.ref
            if not isinstance(ref, ClipFrame):
                images.append(open_image(ref, name=f"record {record.id}, image {ref}"))
                continue
            key = ref.path, ref.num_frames
            if key not in clips:
                clips[key] = video_frames(ref.path, ref.num_frames, name=f"record {record.id}, video {ref.path}")
            images.append(clips[key][ref.index])
        return images


def _placed(
    messages: Sequence[Message], stills: Sequence[Picture], clips: Sequence[Sequence[Picture]], where: str
) -> tuple[list[Message], list[Picture]]:
    """Messages where a clip is as many pictures as it has frames, and all pictures in the order of the texts.

    Without a placeholder everything goes before the first question, pictures first.
    """
    asked = [message for message in messages if message.role == "user"]
    named = [found for message in asked for found in _PLACEHOLDER.findall(message.text)]
    if not named:
        return list(messages), [*stills, *(frame for clip in clips for frame in clip)]
    counts = named.count(IMAGE_PLACEHOLDER), named.count(VIDEO_PLACEHOLDER)
    if counts != (len(stills), len(clips)):
        raise RecordError(
            f"{where}: {counts[0]} {IMAGE_PLACEHOLDER} and {counts[1]} {VIDEO_PLACEHOLDER} placeholders for "
            f"{len(stills)} images and {len(clips)} videos"
        )
    waiting_stills, waiting_clips, pictures = iter(stills), iter(clips), list[Picture]()

    def place(found: re.Match[str]) -> str:
        shown = [next(waiting_stills)] if found[0] == IMAGE_PLACEHOLDER else next(waiting_clips)
        pictures.extend(shown)
        return IMAGE_PLACEHOLDER * len(shown)

    texts = [_PLACEHOLDER.sub(place, each.text) if each.role == "user" else each.text for each in messages]
    placed = [Message(role=each.role, text=text) for each, text in zip(messages, texts, strict=True)]
    return placed, pictures


def _turns(value: Mapping[str, Any], where: str) -> list[Any]:
    turns = value.get("messages", value.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"{where}: needs a non-empty list 'messages' (or 'conversations'); keys are {sorted(value)}")
    return turns


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RecordError(f"{where}: a message must be an object with role and content, not {type(turn).__name__}")
    role = turn.get("role", turn.get("from"))
    text = turn.get("content", turn.get("text", turn.get("value")))
    if not isinstance(role, str) or role not in _ROLES:
        raise RecordError(f"{where}: role {role!r}; known are {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise RecordError(f"{where}: the text of a {role} message must be a string, not {type(text).__name__}")
    return Message(role=_ROLES[role], text=text)


def _refs(value: Mapping[str, Any], keys: Sequence[str], where: str) -> list[str]:
    refs = next((value[key] for key in keys if value.get(key) is not None), None)
    refs = [] if refs is None else [refs] if isinstance(refs, str) else refs
    if not isinstance(refs, list) or not all(isinstance(ref, str) and ref and "\0" not in ref for ref in refs):
        raise RecordError(f"{where}: '{keys[0]}' must be a list of file paths")
    return refs
