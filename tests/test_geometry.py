"""Grids and token counts, against the library's own implementation of the same rule and by property."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sailvl.geometry import (
    AnyRes,
    ImagePolicy,
    Tiling,
    enlarged,
    grid,
    grid_of,
    grids,
    has_thumbnail,
    num_image_tokens,
    num_tiles,
    patch_grid,
    schemes,
    tile_boxes,
)

sizes = st.integers(1, 6000)


@settings(max_examples=400, deadline=None)
@given(width=sizes, height=sizes, limits=st.sampled_from([(1, 6), (1, 10), (1, 12), (2, 9), (4, 4), (1, 24)]))
def test_grid_equals_the_librarys_rule(width: int, height: int, limits: tuple[int, int]) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    expected = get_optimal_tiled_canvas((height, width), (448, 448), *limits)
    assert grid(width, height, Tiling(min_tiles=limits[0], max_tiles=limits[1])) == expected


@pytest.mark.parametrize(
    ("width", "height", "max_tiles", "expected"),
    [
        # Aspect 1 is shared by 1x1, 2x2 and 3x3: the larger one only if the picture covers more than half of it.
        (448, 448, 10, (1, 1)),
        (633, 633, 10, (1, 1)),
        (634, 634, 10, (2, 2)),
        (950, 950, 10, (2, 2)),
        (951, 951, 10, (3, 3)),
        # Aspect 0.75 is as far from 1x1 as from 1x2, half of which is 200,704 pixels.
        (387, 516, 2, (1, 1)),
        (390, 520, 2, (1, 2)),
        (1, 1, 10, (1, 1)),
        (1, 5000, 10, (1, 10)),
        (10_000, 20, 10, (10, 1)),
    ],
)
def test_ties_and_extremes(width: int, height: int, max_tiles: int, expected: tuple[int, int]) -> None:
    assert grid(width, height, Tiling(max_tiles=max_tiles)) == expected


@settings(max_examples=200, deadline=None)
@given(width=sizes, height=sizes, low=st.integers(1, 4), more=st.integers(0, 12), thumbnail=st.booleans())
def test_counts_hold_together(width: int, height: int, low: int, more: int, thumbnail: bool) -> None:
    tiling = Tiling(min_tiles=low, max_tiles=low + more, thumbnail=thumbnail)
    columns, rows = grid(width, height, tiling)
    count = num_tiles(width, height, tiling)
    assert low <= columns * rows <= low + more
    assert count == columns * rows + (thumbnail and columns * rows > 1)
    assert num_image_tokens(width, height, tiling) == 256 * count + 2
    assert num_tiles(width, height, tiling, frame=True) == 1
    assert num_image_tokens(width, height, tiling, frame=True) == 258


def test_boxes_cover_the_canvas_row_by_row() -> None:
    assert tile_boxes(2, 2, 10) == [(0, 0, 10, 10), (10, 0, 20, 10), (0, 10, 10, 20), (10, 10, 20, 20)]


@pytest.mark.parametrize(("side", "tokens"), [(448, 256), (112, 16), (56, 4)])
def test_tokens_per_tile(side: int, tokens: int) -> None:
    assert Tiling(side=side).tokens_per_tile == tokens


@pytest.mark.parametrize("wrong", [{"side": 100}, {"side": 0}, {"min_tiles": 0}, {"min_tiles": 5, "max_tiles": 4}])
def test_impossible_tilings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"tile (side|limits)"):
        Tiling(**wrong)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 3)])
def test_an_empty_picture_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        grid(*size, Tiling())


# ---- policies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        # Recorded from the published evaluation adapter at 448 pixels and at most 10 tiles: (columns, rows).
        (448, 448, (1, 1)),
        (1000, 1000, (3, 3)),
        (300, 4000, (1, 10)),
        (1, 1, (1, 1)),
        (2732, 1436, (4, 2)),
        (1803, 430, (4, 1)),
        (1620, 65, (10, 1)),
        (1381, 1981, (2, 3)),
        (1109, 685, (3, 2)),
        (328, 2571, (1, 8)),
    ],
)
def test_published_grids(width: int, height: int, expected: tuple[int, int]) -> None:
    assert grid(width, height, Tiling()) == expected


@pytest.mark.parametrize(
    ("width", "height", "max_tiles", "plain", "both"),
    [
        # Recorded from the same adapter at 28 pixels: tiles without and with the second grid, the thumbnail included.
        (448, 448, 1, 1, 2),
        (896, 448, 10, 9, 19),
        (448, 896, 18, 19, 27),
        (1000, 1000, 1, 1, 2),
        (640, 480, 10, 7, 16),
        (333, 500, 18, 7, 22),
        (300, 4000, 1, 1, 2),
        (100, 100, 10, 10, 14),
        (1920, 1080, 18, 16, 34),
        (1, 1, 1, 1, 2),
        (5000, 10, 10, 11, 20),
        (2644, 452, 18, 7, 12),
        (2732, 1436, 1, 1, 2),
        (1697, 3000, 10, 9, 15),
        (2747, 2097, 18, 13, 19),
        (2240, 146, 1, 1, 2),
        (1145, 2304, 10, 9, 19),
        (2250, 729, 18, 13, 27),
        (1381, 1981, 1, 1, 2),
        (456, 465, 10, 10, 14),
    ],
)
def test_published_tile_counts(width: int, height: int, max_tiles: int, plain: int, both: int) -> None:
    tiling = Tiling(side=28, max_tiles=max_tiles)
    assert num_tiles(width, height, tiling) == plain
    assert num_tiles(width, height, replace(tiling, msac=True)) == both


@settings(max_examples=300, deadline=None)
@given(width=sizes, height=sizes, max_tiles=st.integers(1, 24), min_tiles=st.integers(1, 4))
def test_the_second_grid_cuts_elsewhere(width: int, height: int, max_tiles: int, min_tiles: int) -> None:
    tiling = Tiling(max_tiles=max(min_tiles, max_tiles), min_tiles=min_tiles, msac=True)
    first, cuts = grid(width, height, tiling), grids(width, height, tiling)
    if first == (1, 1):
        assert len(cuts) == 1, "its one tile is the whole picture, which comes last anyway"
    else:
        assert cuts[0] == first and len(cuts) == 2
    columns, rows = cuts[-1]
    assert (columns, rows) == (1, 1) or first[0] % columns or first[1] % rows
    assert has_thumbnail(cuts, tiling)
    assert num_tiles(width, height, tiling) == sum(c * r for c, r in cuts) + 1 <= 2 * tiling.max_tiles + 1
    without = replace(tiling, thumbnail=False)
    assert num_tiles(width, height, without) == num_tiles(width, height, tiling), "the whole picture always ends them"


def test_second_grids_by_hand() -> None:
    tiling = Tiling(max_tiles=6, msac=True)
    # (3, 1) and (5, 1) are equally near, and the picture covers more than half of the larger; (2, 1) divides (4, 1).
    assert grids(448 * 4, 448, tiling) == ((4, 1), (5, 1))
    assert grids(448 * 2, 448 * 3, tiling) == ((2, 3), (1, 2))
    assert grids(448, 448, tiling) == ((2, 2),)
    assert grids(448, 448, replace(tiling, max_tiles=1)) == ((1, 1),)


def test_one_scheme_per_picture() -> None:
    base = Tiling(max_tiles=10)
    assert schemes(base, None, 3) == schemes(base, ImagePolicy(), 3) == [base] * 3, "nothing asked, nothing changed"
    assert schemes(base, ImagePolicy(max_tiles=24), 0) == []
    assert [s.max_tiles for s in schemes(base, ImagePolicy(max_tiles=24), 1)] == [24], "a policy may raise the limit"
    assert [s.max_tiles for s in schemes(base, ImagePolicy(max_tiles=24), 5)] == [12] * 5, "64 shared by five"
    assert [s.max_tiles for s in schemes(base, ImagePolicy(max_tiles=4), 5)] == [4] * 5
    assert [s.max_tiles for s in schemes(base, ImagePolicy(max_tiles=4), 100)] == [1] * 100, "at least one each"
    assert [s.max_tiles for s in schemes(base, ImagePolicy(upscale=2), 100)] == [10] * 100, "shared if limited, only"
    assert [s.msac for s in schemes(base, ImagePolicy(msac=True), 1)] == [True]
    assert [s.msac for s in schemes(base, ImagePolicy(msac=True), 2)] == [False, False]
    assert [s.upscale for s in schemes(base, ImagePolicy(upscale=2, max_tiles=3), 3)] == [2, 1, 1]
    tight = schemes(Tiling(min_tiles=4, max_tiles=10), ImagePolicy(max_tiles=24), 32)[0]
    assert (tight.min_tiles, tight.max_tiles) == (2, 2), "a share below the least number of tiles lowers that too"
    anyres = schemes(AnyRes(), ImagePolicy(max_tiles=24, msac=True, upscale=2), 1)
    assert anyres == [AnyRes(max_tiles=24, upscale=2)], "no second grid at any resolution"


@settings(max_examples=200, deadline=None)
@given(max_tiles=st.integers(1, 100), count=st.integers(1, 100))
def test_sharing_again_changes_nothing(max_tiles: int, count: int) -> None:
    """A server may be told the share instead of the limit, and share once more, among fewer pictures."""
    for base in (Tiling(), AnyRes()):
        shared = schemes(base, ImagePolicy(max_tiles=max_tiles), count)[0].max_tiles
        assert shared is not None and (shared == 1 or shared * count <= 64)
        for fewer in range(1, count + 1):
            assert schemes(base, ImagePolicy(max_tiles=shared), fewer)[0].max_tiles == shared


def test_upscaling() -> None:
    twice = Tiling(upscale=2)
    assert enlarged(300, 200, twice) == (600, 400) and enlarged(3, 3, Tiling(upscale=1.5)) == (4, 4)
    assert num_tiles(320, 320, Tiling()) == 1 and num_tiles(320, 320, twice) == 5, "640 pixels cover half of 2 x 2"
    assert num_tiles(320, 320, twice, frame=True) == 1
    assert enlarged(1, 5000, Tiling(upscale=4)) == (4, 20_000)
    width, height = enlarged(9000, 4000, Tiling(upscale=4))
    assert (width, height) == (12_000, 5333), "as far as 64 million pixels"
    assert enlarged(90_000, 4000, Tiling(upscale=4)) == (90_000, 4000), "never smaller"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ImagePolicy(max_tiles=0), "max_tiles must be at least 1, got 0"),
        (lambda: ImagePolicy(upscale=0.5), "upscale must be between 1 and 4, got 0.5"),
        (lambda: ImagePolicy(upscale=float("nan")), "upscale must be between 1 and 4, got nan"),
        (lambda: Tiling(upscale=5), "upscale must be between 1 and 4, got 5"),
        (lambda: AnyRes(max_tiles=0), "max_tiles must be at least 1, got 0"),
        (lambda: AnyRes(max_side=100), "side 100 is not divisible"),
        (lambda: AnyRes(side=50), "side 50 is not divisible"),
    ],
)
def test_impossible_policies_are_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


# ---- any resolution ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (448, 448, (32, 32)),
        (1, 1, (2, 2)),
        (28, 41, (2, 2)),
        (28, 42, (4, 2)),
        (1792, 1792, (128, 128)),
        (10_000, 10_000, (128, 128)),
        (1, 5000, (128, 2)),
        (5000, 1, (2, 128)),
        (3584, 1792, (64, 128)),
        (640, 480, (34, 46)),
    ],
)
def test_patch_grids(width: int, height: int, expected: tuple[int, int]) -> None:
    assert patch_grid(width, height, AnyRes()) == expected


anyres = st.builds(
    lambda side, most, tiles, upscale: AnyRes(side=side, max_side=side * most, max_tiles=tiles, upscale=upscale),
    st.sampled_from([28, 56, 112, 448]),
    st.integers(1, 4),
    st.none() | st.integers(1, 70),
    st.sampled_from([1.0, 2.0, 4.0]),
)
wide_sizes = st.integers(1, 6000) | st.sampled_from([1, 2, 27, 28, 29, 5000, 100_000])


@settings(max_examples=600, deadline=None)
@given(width=wide_sizes, height=wide_sizes, scheme=anyres, frame=st.booleans())
def test_a_patch_grid_keeps_every_bound(width: int, height: int, scheme: AnyRes, frame: bool) -> None:
    rows, columns = grid_of(width, height, scheme, frame)
    assert rows >= 2 <= columns and rows % 2 == 0 == columns % 2
    assert max(rows, columns) * scheme.patch <= (scheme.side if frame else scheme.max_side)
    per_tile = scheme.tokens_per_tile
    tokens = rows * columns // 4
    assert num_image_tokens(width, height, scheme, frame) == tokens + 2
    assert num_tiles(width, height, scheme, frame) == -(-tokens // per_tile)
    if frame:
        assert num_tiles(width, height, scheme, frame) == 1
    if scheme.max_tiles is not None:
        assert num_tiles(width, height, scheme, frame) <= scheme.max_tiles
    wide, high = (width, height) if frame else enlarged(width, height, scheme)
    assert columns * scheme.patch <= wide + 14 or columns == 2, "never enlarged by more than rounding"
    assert rows * scheme.patch <= high + 14 or rows == 2


@settings(max_examples=300, deadline=None)
@given(width=st.integers(200, 4000), height=st.integers(200, 4000), max_tiles=st.none() | st.integers(2, 20))
def test_the_aspect_ratio_is_kept(width: int, height: int, max_tiles: int | None) -> None:
    scheme = AnyRes(max_tiles=max_tiles)
    rows, columns = patch_grid(width, height, scheme)
    # Each side is off by at most one token.
    assert (columns - 2) / (rows + 2) < width / height < (columns + 2) / max(rows - 2, 1e-9)
    limit = scheme.max_tiles * 256 if scheme.max_tiles else 64 * 64
    fitting = min(1.0, 1792 / max(width, height), (limit * 784 / (width * height)) ** 0.5)
    assert rows * columns // 4 >= (width * fitting / 28 - 1) * (height * fitting / 28 - 1), "no needless loss"


def test_an_area_that_fits_exactly_is_used() -> None:
    for tiles in range(1, 17):
        rows, columns = patch_grid(1792, 1792, AnyRes(max_tiles=tiles))
        assert rows == columns == 2 * int((tiles * 256) ** 0.5)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 3)])
def test_an_empty_picture_has_no_patches(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        patch_grid(*size, AnyRes())
