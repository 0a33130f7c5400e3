"""Pictures of every mode and size to tiles: against the library's processor, and the published order of steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sailvl.geometry import Tiling, grid
from sailvl.model.tiles import MEAN, STD, SailVLImageProcessor

TILING = {"side": 56, "max_tiles": 6}
PROCESSOR = SailVLImageProcessor(**TILING)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    if mode == "P":
        image = Image.fromarray(random.integers(0, 256, (height, width), dtype=np.uint8))
        image.putpalette(random.integers(0, 256, 768, dtype=np.uint8).tobytes())
        return image
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Image.frombytes(mode, (width, height), random.integers(0, 256, shape, dtype=np.uint8).tobytes())


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400), max_tiles=st.sampled_from([1, 4, 10]))
def test_rgb_tiles_equal_the_librarys(width: int, height: int, max_tiles: int) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    oracle = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56},
        crop_to_patches=True,
        min_patches=1,
        max_patches=max_tiles,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    image = noise(width, height, seed=width * 1000 + height)
    expected = np.asarray(oracle(image, return_tensors="np")["pixel_values"])
    actual = SailVLImageProcessor(side=56, max_tiles=max_tiles).preprocess_image(image)
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    # The library scales in another order; half a grey level would be 0.009.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def published(image: Image.Image, columns: int, rows: int, side: int) -> np.ndarray:
    """The published steps: resize and cut in the picture's own mode, then RGB, then bicubic to the side, normalise."""
    stretched = image.resize((columns * side, rows * side))
    tiles = []
    for index in range(columns * rows):
        left, upper = index % columns * side, index // columns * side
        tiles.append(stretched.crop((left, upper, left + side, upper + side)))
    if len(tiles) > 1:
        tiles.append(image.resize((side, side)))
    done = []
    for tile in tiles:
        pixels = np.asarray(tile.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
        done.append(((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1))
    return np.stack(done)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "CMYK", "1"])
def test_official_order(mode: str) -> None:
    image = noise(150, 70, mode) if mode != "1" else noise(150, 70, "L").convert("1")
    columns, rows = grid(150, 70, Tiling(**TILING))
    expected = published(image, columns, rows, 56)
    np.testing.assert_allclose(PROCESSOR.preprocess_image(image, official_order=True), expected, rtol=0, atol=1e-6)
    default = PROCESSOR.preprocess_image(image)
    assert default.shape == expected.shape
    # The two orders agree where no alpha and no palette is involved, and the test can tell where they do not.
    assert np.allclose(default, expected, atol=1e-6) == (mode in ("RGB", "L"))


def grey(image: Image.Image) -> float:
    """Mean of the picture's tiles, as a level 0..255."""
    return float(
        (PROCESSOR.preprocess_image(image) * np.reshape(STD, (3, 1, 1)) + np.reshape(MEAN, (3, 1, 1))).mean() * 255
    )


def test_transparency_is_white() -> None:
    hidden = Image.new("RGBA", (60, 60), (255, 0, 0, 0))
    palette = Image.new("P", (60, 60), 3)
    palette.info["transparency"] = 3
    for image in (hidden, hidden.convert("LA"), palette):
        assert grey(image) == pytest.approx(255, abs=0.01)
    assert grey(Image.new("RGBA", (60, 60), (100, 100, 100, 255))) == pytest.approx(100, abs=0.01)


def test_sixteen_bit_grey_keeps_its_level() -> None:
    pixels = np.full((60, 60), 0x8000, np.uint16)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels.astype(np.int32))):
        assert image.mode.startswith("I") and grey(image) == pytest.approx(128, abs=0.01)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"]
)
@pytest.mark.parametrize("size", [(1, 1), (3, 200)])
def test_every_mode_gives_finite_tiles(mode: str, size: tuple[int, int]) -> None:
    tiles = PROCESSOR.preprocess_image(Image.new(mode, size))
    assert np.isfinite(tiles).all() and tiles.shape[1:] == (3, 56, 56)


@pytest.mark.parametrize(("size", "count"), [((1, 1), 1), ((1, 5000), 7), ((10_000, 20), 7), ((7000, 6), 7)])
def test_extreme_sizes(size: tuple[int, int], count: int) -> None:
    assert PROCESSOR.preprocess_image(Image.new("RGB", size)).shape == (count, 3, 56, 56)
    assert PROCESSOR.preprocess_image(Image.new("RGB", size), frame=True).shape == (1, 3, 56, 56)


def test_an_empty_picture_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one pixel, got 0 x 5"):
        PROCESSOR.preprocess_image(Image.new("RGB", (0, 5)))


def test_tiles_follow_the_grid() -> None:
    """Four flat quarters come back as four flat tiles in reading order, then their mixture."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    image = Image.new("RGB", (112, 112))
    for index, colour in enumerate(colours):
        image.paste(colour, (index % 2 * 56, index // 2 * 56, index % 2 * 56 + 56, index // 2 * 56 + 56))
    tiles = PROCESSOR.preprocess_image(image)
    levels = (tiles * np.reshape(STD, (3, 1, 1)) + np.reshape(MEAN, (3, 1, 1))) * 255
    assert [tuple(np.rint(tile.mean((1, 2))).astype(int)) for tile in levels[:4]] == colours
    assert len(tiles) == 5 and np.abs(levels[4].mean((1, 2)) - [127.5, 127.5, 63.75]).max() < 1


def test_batches_arrays_and_limits() -> None:
    wide, small = noise(170, 50), noise(20, 20)
    out = PROCESSOR([[wide], [small, wide]], frames=[False, False, True], return_tensors="pt")
    assert out["num_tiles"] == [4, 1, 1] and out["pixel_values"].shape == (6, 3, 56, 56)
    assert isinstance(out["pixel_values"], torch.Tensor)
    assert PROCESSOR(wide, max_tiles=1)["num_tiles"] == [1]
    for array in (np.asarray(wide), np.asarray(wide).transpose(2, 0, 1), torch.from_numpy(np.array(wide))):
        np.testing.assert_array_equal(PROCESSOR(array)["pixel_values"], PROCESSOR(wide)["pixel_values"])
    assert PROCESSOR([])["pixel_values"].shape == (0, 3, 56, 56)
    with pytest.raises(ValueError, match="2 frame marks for 1 images"):
        PROCESSOR(wide, frames=[True, False])
    with pytest.raises(ValueError, match="max_tiles must be at least 1"):
        PROCESSOR(wide, max_tiles=0)
    with pytest.raises(ValueError, match=r"tile limits must hold 1 <= min <= max, got 5\.\.4"):
        PROCESSOR(wide, min_tiles=5, max_tiles=4)
    with pytest.raises(ValueError, match=r"prompts of \[1, 2\] pictures for 2 images"):
        PROCESSOR([wide, small], counts=[1, 2])
    for wrong in ("picture.png", b"bytes", np.zeros((4, 4), np.float32)):
        with pytest.raises(TypeError, match="Pillow pictures or uint8 arrays"):
            PROCESSOR(wrong)


@pytest.mark.parametrize(
    ("released", "expected"),
    [
        ({"max_patches": 10, "image_size": 448, "use_msac": True, "patch_size": 14}, Tiling()),
        ({"max_dynamic_patch": 6, "min_dynamic_patch": 2, "image_size": {"height": 112, "width": 112}},
         Tiling(side=112, min_tiles=2, max_tiles=6)),
        ({"use_thumbnail": False}, Tiling(thumbnail=False)),
        ({}, Tiling()),
    ],
)  # fmt: skip
def test_released_settings(released: dict[str, object], expected: Tiling) -> None:
    processor = SailVLImageProcessor(**released, auto_map={}, pad_input=True, image_processor_type="X")
    assert processor.tiling == expected
    assert SailVLImageProcessor(**processor.to_dict()).to_dict() == processor.to_dict()
    assert not {"auto_map", "pad_input", "use_msac", "patch_size"} & processor.to_dict().keys()
