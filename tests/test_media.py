from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from sailvl.media import MediaError, image_size, open_image, to_rgb


def noise(width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_reads_paths_and_bytes(tmp_path: Path, format: str) -> None:
    data = saved(noise(), format)
    path = tmp_path / "misnamed.png"
    path.write_bytes(data)
    for source in (data, path, str(path)):
        assert image_size(source) == open_image(source).size == (40, 30)
    if format not in ("JPEG", "WEBP", "GIF"):
        np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(noise()))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once_and_sizes_agree(format: str, orientation: int) -> None:
    # what a viewer shows has red top left, green top right, blue bottom left; store it turned
    upright = Image.new("RGB", (32, 16), "black")
    for colour, corner in (("red", (0, 0)), ("lime", (16, 0)), ("blue", (0, 8))):
        upright.paste(colour, (*corner, corner[0] + 16, corner[1] + 8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL.Image.Transpose values that invert each orientation
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(stored, format, exif=exif, **({"quality": 95} if format in ("JPEG", "WEBP") else {}))
    image = open_image(data)
    assert image.size == image_size(data) == (32, 16)
    for colour, at in (((255, 0, 0), (4, 2)), ((0, 255, 0), (28, 2)), ((0, 0, 255), (4, 13))):
        assert np.abs(np.subtract(to_rgb(image).getpixel(at), colour)).max() < 40
    again = open_image(saved(image, "PNG"))
    assert again.size == (32, 16)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("keep", [0.98, 0.7, 0.4])
def test_a_file_cut_short_is_an_error_that_names_it(tmp_path: Path, format: str, keep: float) -> None:
    data = saved(noise(200, 150), format)
    path = tmp_path / f"cut.{format.lower()}"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(MediaError, match=r"cut\."):
        open_image(path)


def bomb(width: int, height: int) -> bytes:
    """A PNG header that promises width x height pixels, and nothing behind it."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\4\0IDAT"


@pytest.mark.parametrize("size", [(10_000, 10_000), (100_000, 100_000), (64_000_001, 1)])
@pytest.mark.parametrize("read", [open_image, image_size])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int], read: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match=r"evil: .*over the limit of 64000000 pixels"):
            read(bomb(*size), name="evil")  # type: ignore[operator]


def test_the_limit_is_the_callers_and_pillows_settings_are_left_alone() -> None:
    before, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    data = saved(noise(), "PNG")
    assert open_image(data, max_pixels=1200).size == (40, 30)
    with pytest.raises(MediaError, match="40 x 30 is over the limit of 1199 pixels"):
        open_image(data, max_pixels=1199)
    assert (before, filters) == (Image.MAX_IMAGE_PIXELS, list(warnings.filters))


def test_what_is_no_picture_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("just words")
    (tmp_path / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (tmp_path / "folder.png").mkdir()
    cases = {"empty": "empty", "text": "not a picture", "script": "not a picture", "folder": "not a regular file"}
    for name, reason in {**cases, "missing": "no such file"}.items():
        for read in (open_image, image_size):
            with pytest.raises(MediaError, match=rf"{name}\.png: {reason}"):
                read(tmp_path / f"{name}.png")
    with pytest.raises(MediaError, match="empty"):
        open_image(b"")
    for path in ("/dev/zero", "a\0b"):
        with pytest.raises(MediaError, match=r"not a regular file|no such file"):
            open_image(path)


def test_lenient_decoding_set_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(MediaError, match=r"unset PIL\.ImageFile.LOAD_TRUNCATED_IMAGES"):
        open_image(saved(noise(), "PNG"))


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        data = saved(frames[0], format, save_all=True, append_images=frames[1:])
        image = open_image(data)
        assert image.size == (20, 10)
        assert np.abs(np.subtract(to_rgb(image).getpixel((5, 5)), (255, 0, 0))).max() < 10
        assert not hasattr(image, "n_frames") or image.n_frames == 1


def test_to_rgb_puts_transparency_on_white() -> None:
    clear_black = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    half_red = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert to_rgb(clear_black).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(half_red).getpixel((0, 0)) == (255, 127, 127)
    assert to_rgb(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 3)
    palette.putpalette([9] * 768)
    palette.info["transparency"] = 3
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    keyed = open_image(saved(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3)))
    assert to_rgb(keyed).getpixel((0, 0)) == (255, 255, 255)


def test_to_rgb_of_every_other_mode() -> None:
    deep = Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))
    for image in (deep, open_image(saved(deep, "PNG")), open_image(saved(deep, "TIFF")), deep.convert("I")):
        assert np.asarray(to_rgb(image))[:, :, 0].ravel().tolist() == list(range(256))
    for mode in ("1", "L", "CMYK", "YCbCr", "HSV", "LAB", "F"):
        assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"
    plain = noise()
    assert to_rgb(plain) is plain


@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damaged_bytes_give_a_picture_or_a_media_error(format: str, edits: list[tuple[int, int]]) -> None:
    data = bytearray(saved(noise(12, 9), format))
    for at, value in edits:
        data[at % len(data)] = value
    try:
        image = open_image(bytes(data), max_pixels=10_000)
    except MediaError:
        return
    assert image_size(bytes(data), max_pixels=10_000) == image.size
    assert to_rgb(image).mode == "RGB"
