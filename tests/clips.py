"""Tiny clips for tests, made on the spot: nothing decoded here is downloaded."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

MATRICES = {  # (a, b, c, d): what is stored at (x, y) is shown at (a x + c y, b x + d y)
    1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),
    5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0),
}  # fmt: skip


def scene(index: int, width: int, height: int) -> np.ndarray:
    """A frame that no other index has: coloured noise that moves, uint8 [H, W, 3]."""
    noise = np.random.default_rng(7).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.roll(np.kron(noise, np.ones((8, 8, 1), np.uint8)), (index, 3 * index), (0, 1))


def clip(
    num_frames: int = 40,
    *,
    size: tuple[int, int] = (64, 48),
    codec: str = "mpeg4",
    container: str = "mp4",
    key_every: int = 12,
    times: Sequence[int] | None = None,
    pictures: Sequence[np.ndarray] | None = None,
    audio: bool = False,
    video: bool = True,
    colorspace: int | None = None,
    **options: str,
) -> bytes:
    """An encoded clip. times: when each frame is shown, in 1/25 s."""
    av = __import__("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        streams: list[Any] = []
        if video:
            stream = out.add_stream(codec, rate=25, options=options)
            stream.width, stream.height = size
            stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
            stream.gop_size = key_every
            if colorspace is not None:
                stream.codec_context.colorspace = colorspace
            streams.append(stream)
        if audio:
            sound = out.add_stream("aac", rate=8000)
            streams.append(sound)
            wave = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            wave.sample_rate, wave.pts, wave.time_base = 8000, 0, Fraction(1, 8000)
            out.mux(sound.encode(wave))
        if not num_frames:
            out.start_encoding()
        for index in range(num_frames if video else 0):
            pixels = pictures[index] if pictures is not None else scene(index, *size)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if colorspace is not None:
                frame = frame.reformat(format="yuv420p", dst_colorspace=colorspace)
            frame.pts, frame.time_base = index if times is None else times[index], Fraction(1, 25)
            out.mux(stream.encode(frame))
        for each in streams:
            out.mux(each.encode())
    return file.getvalue()


def every_frame(data: bytes) -> list[np.ndarray]:
    """All frames of a clip by decoding it from end to end in this process, uint8 [H, W, 3]."""
    av = __import__("av")
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def turned(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An MP4 whose display matrix says how its frames are to be shown."""
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = matrix
    numbers = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return data[:at] + b"".join(n.to_bytes(4, "big", signed=True) for n in numbers) + data[at + 36 :]
