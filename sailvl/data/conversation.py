"""One stored row to one Record, the same way for every kind of file.

A row is a mapping, as JSON or a table has it:

- ``messages`` (role; content or text), ``conversations`` (from, value) or ``texts`` (user, assistant). Content is a
  string, or a list of parts: {"type": "text", "text": ...}, {"type": "image", ...}, {"type": "video", ...}.
- ``images`` (or ``image``), ``videos`` (or ``video``) and ``frames``, a list of pictures a clip. A picture is a path,
  the bytes of a file, or {"bytes": ..., "path": ...}.

``<image>`` and ``<video>`` in the texts say where they go. A part may bring its own (``image``, ``path``, ``url``), or
name one of the list by ``index``, or just stand where the next of the list goes. A clip becomes ``num_frames`` pictures
whatever its length, so that a plan needs its header alone.

What a reference means (a path below a folder, a member of an archive) is the source's to say (``pictures.Find``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from sailvl.data.pictures import Find, Kind, to_frames, to_picture
from sailvl.types import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Message, Picture, Record, RecordError
from sailvl.video import check_num_frames

TURNS = ("messages", "conversations", "texts")
COLUMNS = (*TURNS, "id", "images", "image", "videos", "video", "frames", "num_frames")
"""Keys of a row that are looked at."""

_ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip
_PLACEHOLDERS: Mapping[Kind, str] = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}
_KINDS: Mapping[str, Kind] = {
    IMAGE_PLACEHOLDER: "image", VIDEO_PLACEHOLDER: "video", "image": "image", "image_url": "image", "video": "video",
    "video_url": "video",
}  # fmt: skip
_PLACEHOLDER = re.compile(f"{re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)}")


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where something is shown. ``ref``: the part's own; a number in the list; None: the next of the list."""

    kind: Kind
    ref: Any = None


def to_record(
    row: Mapping[str, Any], find: Find, *, id: str, where: str, num_frames: int, meta: Mapping[str, Any]
) -> Record:
    """The row as a Record, picture sizes read from headers. Raises RecordError or MediaError beginning with where."""
    messages, places = [], list[_Place]()
    for turn in _turns(row, where):
        message, shown = _message(turn, where)
        messages.append(message)
        places += shown
    stills, clips = _refs(row, ("images", "image"), where), _refs(row, ("videos", "video"), where)
    if any(place.ref is not None for place in places):
        stills, clips = _in_order(places, "image", stills, where), _in_order(places, "video", clips, where)
    pictures = [to_picture(ref, find, where) for ref in stills]
    if clips or {"videos", "video", "frames"} & {key for key in row if row[key] is not None}:
        frames = _clips(row, clips, find, num_frames, where)
        messages, pictures = _placed(messages, pictures, frames, where)
    return Record(id=id, messages=tuple(messages), pictures=tuple(pictures), meta=meta)


# ---- texts --------------------------------------------------------------------------------------------------------


def _turns(row: Mapping[str, Any], where: str) -> list[Any]:
    turns = next((row[key] for key in TURNS if row.get(key) is not None), None)
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"{where}: needs a non-empty list 'messages' (or 'conversations'); keys are {sorted(row)}")
    if row.get("messages") is None and row.get("conversations") is None:
        roles = ("user", "assistant")
        return [{"role": role, "text": turn.get(role)} for turn in turns if isinstance(turn, dict) for role in roles]
    return turns


def _message(turn: Any, where: str) -> tuple[Message, list[_Place]]:
    if not isinstance(turn, dict):
        raise RecordError(f"{where}: a message must be an object with role and content, not {type(turn).__name__}")
    role = next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)
    if not isinstance(role, str) or role not in _ROLES:
        raise RecordError(f"{where}: role {role!r}; known are {', '.join(_ROLES)}")
    content = next((turn[key] for key in ("content", "text", "value") if turn.get(key) is not None), None)
    pieces = content if isinstance(content, list) else [{"type": "text", "text": content}]
    text, places = "", list[_Place]()
    for piece in pieces:
        kind = str(piece.get("type")) if isinstance(piece, dict) else type(piece).__name__
        if kind in _KINDS and _ROLES[role] == "user":
            places.append(_Place(kind=_KINDS[kind], ref=_own(piece, _KINDS[kind])))
            text += _PLACEHOLDERS[_KINDS[kind]]
            continue
        if kind != "text":
            raise RecordError(f"{where}: a part of type {kind!r} in a {role} message; text is known, to users pictures")
        said = piece.get("text")
        if not isinstance(said, str):
            raise RecordError(f"{where}: the text of a {role} message must be a string, not {type(said).__name__}")
        if _ROLES[role] == "user":
            places += [_Place(kind=_KINDS[mark]) for mark in _PLACEHOLDER.findall(said)]
        text += said
    return Message(role=_ROLES[role], text=text), places


def brings_own(row: Mapping[str, Any], kind: Kind) -> bool:
    """Whether a part of the row's texts brings its own picture or clip, so that none need be listed."""
    turns: list[Any] = next((row[key] for key in TURNS if isinstance(row.get(key), list)), [])
    contents = [turn["content"] for turn in turns if isinstance(turn, dict) and isinstance(turn.get("content"), list)]
    parts = [part for content in contents for part in content if isinstance(part, dict)]
    shown = [_own(part, kind) for part in parts if _KINDS.get(str(part.get("type"))) == kind]
    return any(not isinstance(ref, int | None) for ref in shown)


def _own(piece: Mapping[str, Any], kind: Kind) -> Any:
    if piece.get("bytes") is not None:
        return piece
    keys = (kind, f"{kind}_url", "path", "url", "index")
    ref = next((piece[key] for key in keys if piece.get(key) is not None), None)
    return ref["url"] if isinstance(ref, Mapping) and "url" in ref else ref


# ---- pictures -----------------------------------------------------------------------------------------------------


def _refs(row: Mapping[str, Any], keys: Sequence[str], where: str) -> list[Any]:
    refs = next((row[key] for key in keys if row.get(key) is not None), None)
    refs = [] if refs is None else refs if isinstance(refs, list) else [refs]
    if not all(map(_is_ref, refs)):
        raise RecordError(f"{where}: '{keys[0]}' must be a list of file paths (or of files' bytes)")
    return refs


def _is_ref(ref: Any) -> bool:
    if isinstance(ref, Mapping):
        return isinstance(ref.get("bytes"), bytes) or (ref.get("bytes") is None and _is_ref(ref.get("path")))
    return isinstance(ref, bytes) or (isinstance(ref, str) and ref != "" and "\0" not in ref)


def _in_order(places: Sequence[_Place], kind: Kind, listed: Sequence[Any], where: str) -> list[Any]:
    """What the places of a kind show, in their order; all that is listed must be shown."""
    places = [place for place in places if place.kind == kind]
    if kind == "video" and not listed:  # then a "<video>" in a text is a word
        places = [place for place in places if place.ref is not None]
    named = {place.ref for place in places if isinstance(place.ref, int)}
    others = (number for number in count() if number not in named)
    refs = []
    for place in places:
        ref = next(others) if place.ref is None else place.ref
        if isinstance(ref, int) and not 0 <= ref < len(listed):
            raise RecordError(f"{where}: the texts show {kind} {ref + 1}, the record lists {len(listed)}")
        refs += [listed[ref]] if isinstance(ref, int) else _refs({kind: ref}, (kind,), where)
    if next(others) < len(listed):
        raise RecordError(f"{where}: the texts show {len(places)} {kind}s, and not all of the {len(listed)} listed")
    return refs


def _clips(
    row: Mapping[str, Any], videos: Sequence[Any], find: Find, num_frames: int, where: str
) -> list[list[Picture]]:
    """The frames of each clip, videos before lists of frames."""
    wanted = num_frames if row.get("num_frames") is None else row["num_frames"]
    try:
        check_num_frames(wanted)
    except ValueError as error:
        raise RecordError(f"{where}: {error}") from error
    lists = row.get("frames")
    lists = [] if lists is None else lists
    if not isinstance(lists, list) or not all(isinstance(refs, list) and refs for refs in lists):
        raise RecordError(f"{where}: 'frames' must be a list of clips, each a list of file paths")
    clips = [to_frames(ref, find, wanted, where) for ref in videos]
    for refs in lists:
        clips.append([to_picture(ref, find, where, frame=True) for ref in _refs({"frames": refs}, ("frames",), where)])
    return clips


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
