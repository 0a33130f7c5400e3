"""Pixels to tiles to tokens: the only arithmetic on image size, shared by data, model and serving.

A fixed-resolution encoder sees square tiles only. A large picture is stretched to the grid of tiles whose aspect ratio
is nearest its own, cut row by row, and followed by a thumbnail of the whole when there is more than one tile
(technical report arXiv 2509.14033, section 2; the tie rule is the published processor's). Every caller that counts
tokens counts them here, so that a plan made from file headers matches what the processor later emits exactly.

Cost: a search over at most a few hundred grids, remembered per limit. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How pictures are cut. ``side`` and ``patch`` in pixels; ``merge`` patches per token along each axis.

    ``min_tiles`` and ``max_tiles`` bound the grid; the thumbnail comes on top.
    Raises ValueError if the side does not divide into tokens or the limits are empty.
    """

    side: int = 448
    patch: int = 14
    merge: int = 2
    min_tiles: int = 1
    max_tiles: int = 10
    thumbnail: bool = True

    def __post_init__(self) -> None:
        cell = self.patch * self.merge
        if self.side < 1 or cell < 1 or self.side % cell:
            raise ValueError(f"tile side {self.side} is not divisible by patch {self.patch} x merge {self.merge}")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(f"tile limits must hold 1 <= min <= max, got {self.min_tiles}..{self.max_tiles}")

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens one tile takes in the language model."""
        return (self.side // (self.patch * self.merge)) ** 2


@lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) within the limits, in order of tile count, then columns."""
    found = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(found, key=lambda pair: pair[0] * pair[1]))


def grid(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """The (columns, rows) a picture of ``width`` x ``height`` pixels is stretched to.

    The nearest aspect ratio wins; on an exact tie the later (larger) grid, as long as the picture covers more than half
    of that grid's pixels. Raises ValueError for an empty picture.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture needs at least one pixel, got {width} x {height}")
    aspect = width / height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in _grids(tiling.min_tiles, tiling.max_tiles):
        distance = abs(aspect - columns / rows)
        covers = width * height > 0.5 * tiling.side * tiling.side * columns * rows
        if distance < best_distance or (distance == best_distance and covers):
            best, best_distance = (columns, rows), distance
    return best


def num_tiles(width: int, height: int, tiling: Tiling, frame: bool = False) -> int:
    """Tiles a picture becomes, the thumbnail included; a video frame is always one tile."""
    if frame:
        return 1
    columns, rows = grid(width, height, tiling)
    count = columns * rows
    return count + 1 if tiling.thumbnail and count > 1 else count


def num_image_tokens(width: int, height: int, tiling: Tiling, frame: bool = False) -> int:
    """Tokens a picture takes in the prompt: its image tokens and the two tags around them."""
    return tiling.tokens_per_tile * num_tiles(width, height, tiling, frame) + 2


def tile_boxes(columns: int, rows: int, side: int) -> list[tuple[int, int, int, int]]:
    """Crop boxes (left, upper, right, lower) in pixels of the stretched picture, row by row."""
    return [
        (column * side, row * side, (column + 1) * side, (row + 1) * side)
        for row in range(rows)
        for column in range(columns)
    ]
