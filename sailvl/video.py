"""Clips to frames, safely: PyAV (extra ``video``) in a child process that is bounded and may be killed.

A video decoder is a large parser of hostile bytes, so it runs in a program of its own (``sailvl.video_child``) with a
memory limit, and is killed when its time is up. Container, seconds, frames, pixels and bytes are bounded too, and
everything that goes wrong is a ``MediaError`` that names the file. Nothing is fetched: only container formats are read,
none that names other files.

Frames are those of the published evaluation, int(i * frames / (n + 1)) for i = 1..n, counted in the frames that really
decode. A clip shorter than n therefore repeats frames: there are always exactly n, so that a plan needs no decoding.
Frames are upright (the display matrix is applied) and full size; non-square pixels are left as they are stored.

Cost: 0.1 s to start a child, which then waits for the next clip (33 MB; at most four wait, and they end with this
process); 5 ms for sizes; decoding on one thread (a minute of 720p: 1.8 s), or a fraction of it where the frames lie so
far apart that jumping to key frames pays (0.5 s with a key frame every 30). Works in threads, and in forked or spawned
workers, which start children of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from sailvl.media import MediaError, check_file

NUM_FRAMES = 16
"""Frames of a clip where nobody says otherwise."""

MAX_NUM_FRAMES = 1024
MAX_PIXELS = 16_000_000
"""Default bound on a frame's width x height: above 4K, and 16 frames stay below 1 GB."""

MAX_SECONDS = 4 * 3600.0
MAX_BYTES = 4 << 30
MAX_FRAMES = 1_000_000
TIMEOUT = 120.0
"""Seconds that one clip may take."""

_MEMORY = 2 << 30
_MAX_IDLE = 4
_CHILD = Path(__file__).with_name("video_child.py")
_UPRIGHT = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, kw_only=True)
class VideoSize:
    """Pixels of a frame as ``video_frames`` gives it; ``frames`` and ``seconds`` as the header claims (0: unknown)."""

    width: int
    height: int
    frames: int
    seconds: float


def video_size(
    source: Path | str | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT,
    name: str = "",
) -> VideoSize:
    """The size of a clip from its header and first frame. Raises as ``video_frames`` does."""
    limits = {"max_pixels": max_pixels, "max_seconds": max_seconds}
    _, done = _ask(source, {"op": "size", **limits}, max_bytes, timeout, name)
    return VideoSize(**{key: done[key] for key in ("width", "height", "frames", "seconds")})


def video_frames(
    source: Path | str | bytes,
    num_frames: int = NUM_FRAMES,
    *,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT,
    name: str = "",
) -> list[Image.Image]:
    """``num_frames`` evenly spaced frames of a clip, RGB and upright; frames of a short clip repeat (one object).

    source: a path or the bytes of a file; name: how errors call it. Raises MediaError if the file is missing, empty,
    damaged, cut short, no video, over a limit or slower than ``timeout`` seconds; ValueError if ``num_frames`` is not
    between 1 and 1024; ImportError if PyAV is missing.
    """
    check_num_frames(num_frames)
    limits = {"max_pixels": max_pixels, "max_seconds": max_seconds}
    request = {"op": "frames", "num_frames": num_frames, "jump": True, **limits}
    frames, _ = _ask(source, request, max_bytes, timeout, name)
    return frames


def check_num_frames(num_frames: int) -> None:
    """Raise ValueError if nobody can want so many frames."""
    if type(num_frames) is not int or not 1 <= num_frames <= MAX_NUM_FRAMES:
        raise ValueError(f"num_frames must be between 1 and {MAX_NUM_FRAMES}, got {num_frames!r}")


def _ask(
    source: Path | str | bytes, request: dict[str, Any], max_bytes: int, timeout: float, name: str
) -> tuple[list[Image.Image], dict[str, Any]]:
    """One request to an idle child or a new one: pictures, and the reply that ended them."""
    if find_spec("av") is None:
        raise ImportError("reading videos needs PyAV: pip install 'sailvl[video]'")
    if not name:
        name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else b""
    num_bytes = check_file(source, name)
    if num_bytes > max_bytes:
        raise MediaError(f"{name}: {num_bytes} bytes is over the limit of {max_bytes}")
    path = None if isinstance(source, bytes) else os.path.abspath(source)
    limits = {"max_frames": MAX_FRAMES, "memory": _MEMORY}
    child = _take()
    try:
        frames, done = child.ask({"path": path, "size": len(data), **limits, **request}, data, timeout)
    except BaseException as error:
        child.end()
        if isinstance(error, _Ended):
            raise MediaError(f"{name}: {error}") from None
        raise
    if len(_IDLE) < _MAX_IDLE and not child.late:
        _IDLE.append(child)
    else:
        child.end()
    if "error" in done:
        raise MediaError(f"{name}: {done['error']}")
    return frames, done


# ---- children ---------------------------------------------------------------------------------------------------


class _Ended(Exception):
    """The child is gone; the message says why."""


class _Child:
    """A decoder process, answering one request at a time."""

    def __init__(self) -> None:
        # a session of its own: an interrupt from the terminal is for us, and must not make a clip look damaged
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.late = False

    def ask(self, request: dict[str, Any], data: bytes, timeout: float) -> tuple[list[Image.Image], dict[str, Any]]:
        """Raises _Ended if the child dies, or is killed because ``timeout`` seconds have passed."""

        def kill() -> None:
            self.late = True
            self.process.kill()

        timer = threading.Timer(timeout, kill)
        timer.daemon = True
        timer.start()
        try:
            return self._talk(request, data)
        except (OSError, ValueError, EOFError) as error:
            if self.late:
                raise _Ended(f"takes more than {timeout:g} seconds to decode") from error
            code = self.process.wait()
            raise _Ended(f"the decoder died of it (exit code {code})") from error
        finally:
            timer.cancel()

    def _talk(self, request: dict[str, Any], data: bytes) -> tuple[list[Image.Image], dict[str, Any]]:
        to, back = self.process.stdin, self.process.stdout
        assert to is not None and back is not None
        to.write(json.dumps(request).encode() + b"\n")
        to.write(data)
        to.flush()
        frames: list[Image.Image] = []
        while True:
            line = back.readline()
            if not line:
                raise EOFError
            reply = json.loads(line)
            if "done" in reply or "error" in reply:
                return frames, reply
            if "restart" in reply:
                frames.clear()
                continue
            size, stride = (reply["width"], reply["height"]), reply["stride"]
            pixels = back.read(stride * reply["height"])
            image = Image.frombytes("RGB", size, pixels, "raw", "RGB", stride)  # ValueError if cut off
            turn = _UPRIGHT.get(tuple(reply["turn"]))
            frames += [image if turn is None else image.transpose(turn)] * reply["times"]

    def end(self) -> None:
        """Kill the child and close its pipes."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what is left in the buffer has no reader
                    pipe.close()
        self.process.wait()


_IDLE: list[_Child] = []


def _take() -> _Child:
    """A child that is alive. List operations are atomic: no lock, which a fork could copy while it is held."""
    while True:
        try:
            child = _IDLE.pop()
        except IndexError:
            return _Child()
        if child.process.poll() is None:
            return child
        child.end()


def _end_all() -> None:
    while _IDLE:
        _IDLE.pop().end()


def _disown() -> None:
    """After a fork the children are still the parent's: close our copies of their pipes, and wait for none."""
    for child in _IDLE:
        for pipe in (child.process.stdin, child.process.stdout):
            if pipe is not None:
                pipe.close()
        child.process.returncode = 0
    _IDLE.clear()


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown)
