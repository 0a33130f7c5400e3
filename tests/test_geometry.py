"""Grids and token counts, against the library's own implementation of the same rule and by property."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sailvl.geometry import Tiling, grid, num_image_tokens, num_tiles, tile_boxes

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
