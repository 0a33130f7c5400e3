"""Image policies per call: what is counted is what is cut, for any size, and each prompt of a batch has its own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sailvl.geometry import AnyRes, Tiling
from sailvl.model import SailVLProcessor
from sailvl.model.processing import build_processor
from sailvl.model.tiles import MEAN, STD, SailVLImageProcessor, _cut


class Sketch:
    """A picture without pixels: resizing and cutting it costs nothing, so that thousands of sizes can be cut."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height

    def resize(self, size: tuple[int, int], resample: int | None = None) -> Sketch:
        return Sketch(*size)

    def crop(self, box: tuple[int, int, int, int]) -> Sketch:
        assert 0 <= box[0] < box[2] <= self.width and 0 <= box[1] < box[3] <= self.height, "inside of the picture"
        return Sketch(box[2] - box[0], box[3] - box[1])


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


POLICIES = [
    {},
    {"max_tiles": 12},
    {"max_tiles": 24, "msac": True},
    {"max_tiles": 1, "msac": True},
    {"upscale": 2.0},
    {"max_tiles": 18, "upscale": 4.0, "msac": True},
    {"min_tiles": 3, "max_tiles": 9},
    {"msac": False, "upscale": None, "max_tiles": None, "min_tiles": None},
]
EXTREMES = [(1, 1), (1, 5000), (5000, 1), (2, 100_000), (10_000, 10_000)]


@pytest.fixture(scope="module")
def wide_processor(tiny_tokenizer_file) -> SailVLProcessor:
    return build_processor(tiny_tokenizer_file, tiling=Tiling())


@pytest.fixture(scope="module")
def small_processor(tiny_tokenizer_file) -> SailVLProcessor:
    return build_processor(tiny_tokenizer_file, tiling=Tiling(side=56))


@pytest.fixture(scope="module")
def any_processor(tiny_tokenizer_file) -> SailVLProcessor:
    return build_processor(tiny_tokenizer_file, tiling=AnyRes(side=56, max_side=224))


def test_counted_tiles_are_cut_tiles_for_ten_thousand_sizes(wide_processor) -> None:
    draw = np.random.default_rng(0)
    sizes = EXTREMES + [tuple(size) for size in np.exp(draw.uniform(0, np.log(6000), (10_000, 2))).astype(int).tolist()]
    for (width, height), policy in zip(sizes, itertools.cycle(POLICIES), strict=False):
        counted = wide_processor._get_num_multimodal_tokens(image_sizes=[(height, width)], **policy)
        (scheme,) = wide_processor.image_processor.schemes(1, **{k: v for k, v in policy.items() if v is not None})
        tiles = _cut(Sketch(width, height), scheme, False)  # type: ignore[arg-type]
        assert all((tile.width, tile.height) == (448, 448) for tile in tiles)
        assert counted.num_image_patches == [len(tiles)]
        assert counted.num_image_tokens == [256 * len(tiles) + 2]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["tiles", "any"])
def test_the_extremes_are_counted_as_they_are_made(tiny_processor, any_processor, policy, kind) -> None:
    processor = any_processor if kind == "any" else tiny_processor
    for width, height in EXTREMES[:3]:
        check_one(processor, width, height, policy)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 700), height=st.integers(1, 700), policy=st.sampled_from(POLICIES), any_res=st.booleans())
@example(width=1, height=1, policy=POLICIES[5], any_res=True)
def test_counted_is_made(tiny_processor, any_processor, width: int, height: int, policy, any_res: bool) -> None:
    check_one(any_processor if any_res else tiny_processor, width, height, policy)


def check_one(processor: SailVLProcessor, width: int, height: int, policy: dict[str, object]) -> None:
    counted = processor._get_num_multimodal_tokens(image_sizes=[(height, width)], **policy)
    nested = processor._get_num_multimodal_tokens(image_sizes=[(height, width)], images_kwargs=policy)
    assert (counted.num_image_tokens, counted.num_image_patches) == (nested.num_image_tokens, nested.num_image_patches)
    made = processor(images=Image.new("RGB", (width, height)), text="<IMG_CONTEXT>", return_tensors="pt", **policy)
    assert made["input_ids"].shape[1] == counted.num_image_tokens[0]
    assert made["pixel_values"].shape[0] == counted.num_image_patches[0]
    if "image_grid_hw" in made:
        assert int(made["image_grid_hw"].prod()) == counted.num_image_patches[0]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=7),
    policy=st.sampled_from(POLICIES),
    any_res=st.booleans(),
)
def test_pictures_of_one_prompt_share(tiny_processor, any_processor, sizes, policy, any_res: bool) -> None:
    processor = any_processor if any_res else tiny_processor
    counted = processor._get_num_multimodal_tokens(image_sizes=[(h, w) for w, h in sizes], **policy)
    made = processor(
        images=[Image.new("RGB", size) for size in sizes],
        text="a\n".join(["<IMG_CONTEXT>"] * len(sizes)),
        return_tensors="pt",
        text_kwargs={"return_text_replacement_offsets": True},
        mm_processor_kwargs=policy,
    )
    assert made["image_grid_thw"].prod(1).tolist() == counted.num_image_patches
    assert len(made["pixel_values"]) == sum(counted.num_image_patches)
    expansions = [entry["replacement"].count("<IMG_CONTEXT>") + 2 for entry in made["text_replacement_offsets"][0]]
    assert expansions == counted.num_image_tokens
    assert "image_grid_hw" not in made, "servers would slice it like pixels"


def test_each_prompt_of_a_batch_has_its_own_policy(small_processor) -> None:
    """One call of four prompts is four calls: whose picture is first, alone or one of many is each prompt's matter."""
    square, wide = noise(112, 112, 1), noise(225, 54, 2)
    rows = [
        ([square], "<image>\nred"),
        ([], "what?"),
        ([wide, square], "<image><image>"),
        ([wide] * 16, "<image>" * 16),
    ]
    policy = {"max_tiles": 24, "msac": True, "upscale": 2}
    singles = [
        small_processor(images=pictures or None, text=text, return_tensors="pt", **policy) for pictures, text in rows
    ]
    images = [picture for pictures, _ in rows for picture in pictures]
    batch = small_processor(images=images, text=[text for _, text in rows], return_tensors="pt", padding=True, **policy)
    # One picture, enlarged: 4 x 4, then 3 x 3, then the whole. Two: the first enlarged, 8 x 2 and 2 x 2. Sixteen: the
    # first 4 x 1 as all others, because each may have 4 tiles.
    tiles = [len(single.get("pixel_values", ())) for single in singles]
    assert tiles == [16 + 9 + 1, 0, 16 + 1 + 4 + 1, 16 * 5]
    assert torch.equal(batch["pixel_values"], torch.cat([s["pixel_values"] for s in singles if "pixel_values" in s]))
    for row, single in zip(batch["input_ids"], singles, strict=True):
        assert torch.equal(row[len(row) - single["input_ids"].shape[1] :], single["input_ids"][0])
    counted = small_processor._get_num_multimodal_tokens(image_sizes=[(54, 225), (112, 112)], **policy)
    assert counted.num_image_patches == [17, 5]


def test_lists_of_pictures_without_text_are_prompts() -> None:
    processor = SailVLImageProcessor(side=56)
    square = noise(500, 500)
    shared = processor([[square] * 16, [square]], max_tiles=24)["num_tiles"]
    assert shared == [5] * 16 + [17], "four each for sixteen pictures, sixteen for one, and the thumbnails"
    assert processor([square] * 16, max_tiles=24)["num_tiles"] == [5] * 16
    assert processor([square] * 16)["num_tiles"] == [10] * 16, "unlimited pictures share nothing"


def test_msac_tiles_come_in_order() -> None:
    """Those of the nearest grid, of the second, then the whole picture; the pixels are those of each alone."""
    processor = SailVLImageProcessor(side=56, max_tiles=6)
    image = noise(224, 56)
    tiles = processor(image, msac=True)["pixel_values"]
    first = processor.preprocess_image(image, tiling=Tiling(side=56, min_tiles=4, max_tiles=4))
    second = processor.preprocess_image(image, tiling=Tiling(side=56, min_tiles=5, max_tiles=5))
    np.testing.assert_array_equal(tiles, np.concatenate([first[:4], second[:5], second[5:]]))
    small = processor(noise(60, 60), msac=True)["pixel_values"]
    plain = processor.preprocess_image(noise(60, 60), tiling=Tiling(side=56, min_tiles=4, max_tiles=4))
    np.testing.assert_array_equal(small, plain, "the first grid of one tile is left to the whole picture")


def test_upscaling_is_bilinear_and_for_the_first_picture() -> None:
    processor = SailVLImageProcessor(side=56, max_tiles=6)
    image = noise(50, 40)
    twice = image.resize((100, 80), Image.Resampling.BILINEAR)
    out = processor([image, image], upscale=2)
    assert out["num_tiles"] == [processor(twice)["num_tiles"][0], 1]
    expected = np.concatenate([processor(twice)["pixel_values"], processor(image)["pixel_values"]])
    np.testing.assert_array_equal(out["pixel_values"], expected)
    frames = processor([image, image], upscale=2, frames=[True, False])
    assert frames["num_tiles"] == [1, 1]
    np.testing.assert_array_equal(frames["pixel_values"][0], processor(image, frames=[True])["pixel_values"][0])


def test_frames_are_one_tile_whatever_the_policy(tiny_processor, any_processor) -> None:
    for processor, per_frame in ((tiny_processor, 1), (any_processor, 16)):
        made = processor(
            images=[noise(400, 400)] * 2, text="<image><image>", frames=[True, True], msac=True, max_tiles=24, upscale=4
        )
        assert len(made["pixel_values"]) == 2 * per_frame


def test_wrong_policies_are_refused(tiny_processor) -> None:
    for policy, message in (
        ({"max_tiles": 0}, "max_tiles must be at least 1, got 0"),
        ({"upscale": 9}, "upscale must be between 1 and 4, got 9"),
        ({"min_tiles": 7}, r"tile limits must hold 1 <= min <= max, got 7\.\.4"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_processor(images=noise(9, 9), text="<image>", **policy)
        with pytest.raises(ValueError, match=message):
            tiny_processor._get_num_multimodal_tokens(image_sizes=[(9, 9)], **policy)
    with pytest.raises(ValueError, match="asked for per call"):
        build_processor("nowhere", tiling=Tiling(msac=True))


# ---- any resolution ---------------------------------------------------------------------------------------------


def test_patches_are_the_resized_picture_row_by_row(any_processor) -> None:
    image = noise(150, 100)
    out = any_processor.image_processor(image, return_tensors="pt")
    (rows, columns), patches = out["image_grid_hw"][0].tolist(), out["pixel_values"]
    assert (rows, columns) == (8, 10) and patches.shape == (80, 3, 14, 14) and patches.dtype == torch.float32
    whole = patches.view(rows, columns, 3, 14, 14).permute(2, 0, 3, 1, 4).reshape(3, rows * 14, columns * 14).numpy()
    pixels = np.asarray(image.resize((140, 112), Image.Resampling.BICUBIC), np.float32) / 255
    expected = ((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-6)


def test_what_the_processor_emits_at_any_resolution(any_processor, tmp_path) -> None:
    images = [noise(60, 40), noise(300, 100)]
    out = any_processor(images=images, text="<image>\n<image>", return_tensors="pt")
    assert out["image_grid_hw"].tolist() == [[2, 4], [6, 16]] and out["image_grid_hw"].dtype == torch.int64
    assert int((out["input_ids"] == any_processor.image_token_id).sum()) == 2 + 24
    assert any_processor.model_input_names[-1] == "image_grid_hw"
    clip = any_processor(images=images, text="<image>\n<image>", frames=[True, True], return_tensors="pt")
    assert clip["image_grid_hw"].tolist() == [[2, 4], [2, 4]], "a frame keeps its shape within a tile's sides"
    assert "image_grid_hw" not in any_processor(text="hi")
    assert set(any_processor(images=images)) == {"pixel_values", "image_grid_hw"}
    any_processor.save_pretrained(tmp_path)
    loaded = SailVLProcessor.from_pretrained(tmp_path)
    assert loaded.image_processor.tiling == AnyRes(side=56, max_side=224)
    again = loaded(images=images, text="<image>\n<image>", return_tensors="pt")
    assert all(torch.equal(again[name], out[name]) for name in out)
    loaded.image_processor.max_tiles = 5
    loaded.save_pretrained(tmp_path)
    assert SailVLProcessor.from_pretrained(tmp_path).image_processor.tiling.max_tiles == 5


def test_settings_of_an_image_processor_at_any_resolution() -> None:
    assert SailVLImageProcessor(any_resolution=True).tiling == AnyRes()
    assert SailVLImageProcessor(any_resolution=True, image_size=112, max_patches=3).tiling == AnyRes(
        side=112, max_side=448, max_tiles=3
    )
    for scheme in (AnyRes(side=56, max_side=112, max_tiles=7), Tiling(side=56, thumbnail=False, min_tiles=2)):
        fields = {name: getattr(scheme, name) for name in scheme.__dataclass_fields__}
        processor = SailVLImageProcessor(**fields, any_resolution=isinstance(scheme, AnyRes))
        assert processor.tiling == scheme == SailVLImageProcessor(**processor.to_dict()).tiling
    empty = SailVLImageProcessor(any_resolution=True)([], return_tensors="pt")
    assert empty["pixel_values"].shape == (0, 3, 14, 14) and empty["image_grid_hw"].shape == (0, 2)
