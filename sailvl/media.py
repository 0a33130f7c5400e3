"""Bytes to pictures, safely: the one place that decodes them (``sailvl.video`` decodes clips).

Pictures come from strangers, so the header is read and judged before a pixel is decoded, only plain raster formats are
opened (never one that runs a program, as EPS does), and everything that goes wrong is a ``MediaError`` that names the
file. A damaged file is an error, never a picture with a grey bottom half. Nothing is fetched from a network.

Sizes are those of the picture as it is meant to be seen: the camera's orientation tag is applied. Of an animation the
first frame is used. Cost: about 50 us for a header, 1-10 ms to decode a photograph.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_PIXELS = 64_000_000
"""Default bound on width x height: 192 MB as RGB. A training tile sees far less."""

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPOSING = (5, 6, 7, 8)
# warnings are caught by swapping process-wide state: one header at a time, so that threads restore it in order
_HEADER_LOCK = threading.Lock()


class MediaError(ValueError):
    """A picture that cannot be used: missing, empty, damaged, too large, or not a picture. Names the file."""


@cache
def _formats() -> tuple[str, ...]:
    """The formats this build of Pillow can read; asking it for one it lacks is a KeyError."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def check_file(source: Path | str | bytes, name: str) -> int:
    """Its size in bytes. Raises MediaError if it is missing, empty, or not a regular file."""
    if isinstance(source, bytes):
        num_bytes = len(source)
    else:
        path = Path(source)
        try:
            if not path.exists():
                raise MediaError(f"{name}: no such file")
            if not path.is_file():  # a pipe or a device would block or never end
                raise MediaError(f"{name}: not a regular file")
            num_bytes = os.path.getsize(path)
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
            if isinstance(error, MediaError):
                raise
            raise MediaError(f"{name}: {error}") from error
    if num_bytes == 0:
        raise MediaError(f"{name}: empty, 0 bytes")
    return num_bytes


def _open_bytes(source: Path | str | bytes, name: str) -> BinaryIO:
    check_file(source, name)
    try:
        return io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")
    except OSError as error:
        raise MediaError(f"{name}: {error}") from error


@contextmanager
def _header(source: Path | str | bytes, max_pixels: int, name: str) -> Iterator[tuple[Image.Image, int]]:
    """An opened picture, nothing decoded, and its orientation tag (1 = upright); decoder errors become MediaError."""
    if not name:
        name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    with _open_bytes(source, name) as stream:
        try:
            with _HEADER_LOCK, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                image = Image.open(stream, formats=_formats())
                orientation = _orientation(image)
            width, height = image.size
            if width < 1 or height < 1:
                raise MediaError(f"{name}: {width} x {height} pixels")
            if width * height > max_pixels:
                raise MediaError(f"{name}: {width} x {height} is over the limit of {max_pixels} pixels")
            damage = [text for text in (str(warning.message) for warning in caught) if "Metadata Warning" not in text]
            if damage and image.format == "TIFF":  # in other formats they speak of camera tags, which we can do without
                raise MediaError(f"{name}: damaged: {damage[0]}")
            yield image, orientation
        except MediaError:
            raise
        except UnidentifiedImageError as error:
            raise MediaError(f"{name}: not a picture in a known format ({', '.join(_formats())})") from error
        except Image.DecompressionBombError as error:
            raise MediaError(f"{name}: over the limit of {max_pixels} pixels: {error}") from error
        except Exception as error:  # decoders raise anything at all on hostile bytes
            raise MediaError(f"{name}: damaged: {type(error).__name__}: {error}") from error


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns these itself, and its size already says so
        return 1
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1  # a tag behind the pixels: reading it would decode them
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def image_size(source: Path | str | bytes, *, max_pixels: int = MAX_PIXELS, name: str = "") -> tuple[int, int]:
    """(width, height) in pixels as ``open_image`` will give them, from the header alone. Raises MediaError."""
    with _header(source, max_pixels, name) as (image, orientation):
        width, height = image.size
        return (height, width) if orientation in _TRANSPOSING else (width, height)


def open_image(source: Path | str | bytes, *, max_pixels: int = MAX_PIXELS, name: str = "") -> Image.Image:
    """A decoded, upright picture in its own colour mode, holding no file open.

    source: a path or the bytes of a file; name: how errors call it. Raises MediaError if the file is missing, empty,
    damaged or cut short, has more than max_pixels pixels, or is not a picture.
    """
    with _header(source, max_pixels, name) as (image, orientation):
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise MediaError("unset PIL.ImageFile.LOAD_TRUNCATED_IMAGES: with it, damaged pictures would pass as good")
        image.load()
        turn = _UPRIGHT.get(orientation)
        upright = image.copy() if turn is None else image.transpose(turn)
        upright.info.pop("exif", None)  # applied: a second reader must not turn the picture again
        return upright


def is_animated(source: Path | str | bytes, *, max_pixels: int = MAX_PIXELS, name: str = "") -> bool:
    """Whether a picture file (GIF, WebP, PNG) holds several frames. Raises MediaError."""
    with _header(source, max_pixels, name) as (image, _):
        return bool(getattr(image, "is_animated", False)) and image.format != "MPO"


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB; transparent parts become white, 16-bit grey keeps its high byte."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow would clip at 255 instead
        high = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
