"""Pictures and clips in conversations and prompts: which go where, and opening them.

A conversation's parts are those of transformers: ``{"type": "image", "image": ...}`` (also ``path``, ``url``,
``base64`` or ``image_url``) and ``{"type": "video", "video": ..., "num_frames": n}``. A clip becomes its frames, each a
picture labelled ``Frame-i`` that takes one tile (published evaluation adapter; the report, arXiv 2509.14033, gives no
format). What is a path is opened by ``sailvl.media`` and ``sailvl.video``, with their limits; nothing is ever fetched
from a network.

Paths are opened: whoever serves strangers must replace the paths they write.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from sailvl.media import MediaError, open_image
from sailvl.types import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from sailvl.video import NUM_FRAMES, check_num_frames, video_frames

from .chat import IMAGE_TOKEN
from .tiles import flatten_images

_IMAGE_TYPES, _VIDEO_TYPES = ("image", "image_url"), ("video", "video_url")
_ALIAS = re.compile(f"{re.escape(VIDEO_PLACEHOLDER)}\n?|{re.escape(IMAGE_PLACEHOLDER)}")
_RENDERED = re.compile(rf"(Frame-\d+: )?{re.escape(IMAGE_TOKEN)}")


def spread(chat: Sequence[Mapping[str, Any]], num_frames: int | None = None) -> tuple[list[Any], list[Any], list[bool]]:
    """A conversation whose clips are written out as frames; what its pictures are; which of them are frames.

    num_frames: of a clip that does not say. Nothing is opened: a picture is what the part names, or None, and a frame
    of a file is a ``(file, num_frames, index)`` tuple. Raises ValueError for a part of an unknown type.
    """
    messages, pictures, frames = [], [], []
    for message in chat:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = []
            for part in content:
                kind = part.get("type")
                if kind in _VIDEO_TYPES:
                    clip = _clip(part, num_frames)
                    parts += [{"type": "image", "frame": True}] * len(clip)
                    pictures += clip
                    frames += [True] * len(clip)
                    continue
                if kind in _IMAGE_TYPES:
                    pictures.append(_named(part, "image"))
                    frames.append(bool(part.get("frame")))
                elif not isinstance(part.get("text"), str):
                    raise ValueError(f"a part of a message is of type {kind!r}; known are text, image and video")
                parts.append(part)
            message = {**message, "content": parts}
        messages.append(message)
    return messages, pictures, frames


def _named(part: Mapping[str, Any], kind: str) -> Any:
    """What a part names; None if nothing."""
    value = next((part[key] for key in (kind, "path", "url", f"{kind}_url") if part.get(key) is not None), None)
    if value is None and isinstance(part.get("base64"), str):
        return f"data:;base64,{part['base64']}"
    return value.get("url") if isinstance(value, Mapping) else value


def _clip(part: Mapping[str, Any], num_frames: int | None) -> list[Any]:
    clip = _named(part, "video")
    if isinstance(clip, (list, tuple)) or getattr(clip, "ndim", 0) == 4:
        if not len(clip):
            raise ValueError("a clip without frames")
        return list(clip)
    count = part.get("num_frames", num_frames)
    count = NUM_FRAMES if count is None else count
    check_num_frames(count)
    return [(clip, count, index) for index in range(count)]


def opened(pictures: Sequence[Any]) -> list[Any]:
    """The pictures of ``spread``, decoded; pictures and arrays are passed on. Raises ValueError or MediaError."""
    decoded: list[Any] = []
    clip: list[Any] = []
    for number, picture in enumerate(pictures, 1):
        if isinstance(picture, tuple):
            file, count, index = picture
            if index == 0:
                clip = video_frames(_local(file, f"picture {number}"), count)
            decoded.append(clip[index])
        elif isinstance(picture, (str, Path, bytes)):
            decoded.append(open_image(_local(picture, f"picture {number}")))
        elif picture is None:
            raise ValueError(f"picture {number} of the conversation is not given: name it in its part, or in images")
        else:
            decoded.append(picture)
    return decoded


def _local(source: Any, where: str) -> Path | bytes:
    """A path on this machine or bytes, from what a part may say. Raises ValueError for anything else."""
    if isinstance(source, (bytes, Path)):
        return source
    if not isinstance(source, str):
        raise ValueError(f"{where}: a path or bytes are expected, this is a {type(source).__name__}")
    if source.startswith("data:"):
        head, comma, body = source.partition(",")
        try:
            if not comma or not head.endswith(";base64"):
                raise ValueError("no base64")
            return base64.b64decode(body, validate=True)
        except (ValueError, binascii.Error) as error:
            raise MediaError(f"{where}: a broken data URL: {error}") from error
    if source.startswith("file://"):
        return Path(unquote(urlsplit(source).path))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        raise ValueError(f"{where}: {source[:80]!r} is not on this machine; nothing is fetched: download it first")
    return Path(source)


def interleave(prompts: Sequence[str], images: Any, videos: Any) -> tuple[list[str], list[Any], list[bool]]:
    """Prompts with image tokens alone, their pictures in order, and which of them are frames.

    videos: a clip or a list of clips; a clip is a list of pictures or an array [F, H, W, 3]. In prompts as a template
    renders them, the image tokens behind ``Frame-i: `` are the frames. In others ``<video>`` stands for a clip and
    ``<image>`` for a picture. Raises ValueError if they differ in number.
    """
    stills, clips = flatten_images(images), _clips(videos)
    frames = [frame for clip in clips for frame in clip]
    num_clips = len(clips)
    if not any(IMAGE_TOKEN in prompt for prompt in prompts):
        num_clips = sum(prompt.count(VIDEO_PLACEHOLDER) for prompt in prompts)
        sizes = iter([len(clip) for clip in clips])
        prompts = [_written_out(prompt, sizes) for prompt in prompts]
    marks = [found[1] is not None for prompt in prompts for found in _RENDERED.finditer(prompt)]
    if (num_clips, marks.count(False), marks.count(True)) != (len(clips), len(stills), len(frames)):
        raise ValueError(
            f"the prompts hold {marks.count(False)} placeholders of pictures and {marks.count(True)} of frames in "
            f"{num_clips} videos, for {len(stills)} images and {len(clips)} videos of {[len(c) for c in clips]} frames"
        )
    rest = {False: iter(stills), True: iter(frames)}
    return list(prompts), [next(rest[mark]) for mark in marks], marks


def _written_out(prompt: str, sizes: Iterator[int]) -> str:
    """``<video>`` as the lines of its frames, as the chat template writes them; ``<image>`` as an image token."""
    shown = 0

    def lines(found: re.Match[str]) -> str:
        nonlocal shown
        if found[0] == IMAGE_PLACEHOLDER:
            return IMAGE_TOKEN
        first, shown = shown + 1, shown + next(sizes, 0)
        return "".join(f"Frame-{number}: {IMAGE_TOKEN}\n" for number in range(first, shown + 1))

    return _ALIAS.sub(lines, prompt)


def _clips(videos: Any) -> list[Sequence[Any]]:
    if isinstance(videos, np.ndarray) or not isinstance(videos, (list, tuple)):
        videos = [videos]
    elif videos and not isinstance(videos[0], (list, tuple)) and getattr(videos[0], "ndim", 0) != 4:
        videos = [videos]  # one clip
    for clip in videos:
        if not isinstance(clip, (list, tuple)) and getattr(clip, "ndim", 0) != 4:
            raise ValueError(f"a clip is a list of pictures, not a {type(clip).__name__}: open it with sailvl.video")
    return list(videos)
