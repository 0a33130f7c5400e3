"""Pixels to tiles to tokens: the only arithmetic on image size, shared by data, model and serving.

Two ways of seeing a picture. A fixed-resolution encoder sees square tiles only (``Tiling``): a large picture is
stretched to the grid of tiles whose aspect ratio is nearest its own, cut row by row, and followed by a thumbnail of the
whole when there is more than one tile (technical report arXiv 2509.14033, section 2; the tie rule is the published
processor's). An any-resolution encoder (``AnyRes``) sees the picture as it is, its sides rounded to whole tokens.
Every caller that counts tokens counts them here, so that a plan made from file headers matches what the processor later
emits exactly.

Cost: a search over at most a few hundred grids, remembered per limit. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

Grid: TypeAlias = tuple[int, int]

SHARED_TILES = 64
"""Tiles that the pictures of one prompt share when a policy limits them (published evaluation adapter)."""

MAX_UPSCALED_PIXELS = 64_000_000
"""``upscale`` enlarges no picture beyond this many pixels; tiles see far fewer."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How pictures are cut. ``side`` and ``patch`` in pixels; ``merge`` patches per token along each axis.

    ``min_tiles`` and ``max_tiles`` bound the grid; the thumbnail comes on top. ``msac`` cuts by a second grid too, and
    ``upscale`` enlarges both sides first: what the published evaluation does for some benchmarks.
    Raises ValueError if the side does not divide into tokens or the limits are empty.
    """

    side: int = 448
    patch: int = 14
    merge: int = 2
    min_tiles: int = 1
    max_tiles: int = 10
    thumbnail: bool = True
    msac: bool = False
    upscale: float = 1.0

    def __post_init__(self) -> None:
        _check_side(self.side, self.patch, self.merge)
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(f"tile limits must hold 1 <= min <= max, got {self.min_tiles}..{self.max_tiles}")
        _check_upscale(self.upscale)

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens one tile takes in the language model."""
        return (self.side // (self.patch * self.merge)) ** 2


@dataclass(frozen=True, kw_only=True)
class AnyRes:
    """How pictures are resized for an any-resolution encoder: no tiles, no side above ``max_side`` pixels.

    ``side`` is that of the fixed encoder it came from: it bounds video frames, and a square of it is what ``num_tiles``
    counts in. ``max_tiles`` bounds a picture's area in such squares (None: ``max_side`` alone bounds it).
    """

    side: int = 448
    patch: int = 14
    merge: int = 2
    max_side: int = 1792
    max_tiles: int | None = None
    upscale: float = 1.0

    def __post_init__(self) -> None:
        _check_side(self.side, self.patch, self.merge)
        _check_side(self.max_side, self.patch, self.merge)
        if self.max_tiles is not None and self.max_tiles < 1:
            raise ValueError(f"max_tiles must be at least 1, got {self.max_tiles}")
        _check_upscale(self.upscale)

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that a square of ``side`` takes in the language model."""
        return (self.side // (self.patch * self.merge)) ** 2


Scheme: TypeAlias = Tiling | AnyRes


@dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """What one prompt asks of its pictures; None and the other defaults leave the processor's scheme as it is.

    ``max_tiles`` limits the grid of each picture, and all of a prompt's pictures to 64 tiles together; ``msac`` is for
    prompts of one picture, ``upscale`` (1..4) for the first picture.
    """

    max_tiles: int | None = None
    msac: bool = False
    upscale: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tiles is not None and self.max_tiles < 1:
            raise ValueError(f"max_tiles must be at least 1, got {self.max_tiles}")
        _check_upscale(self.upscale)


def _check_side(side: int, patch: int, merge: int) -> None:
    cell = patch * merge
    if side < 1 or cell < 1 or side % cell:
        raise ValueError(f"tile side {side} is not divisible by patch {patch} x merge {merge}")


def _check_upscale(upscale: float) -> None:
    if not 1 <= upscale <= 4:
        raise ValueError(f"upscale must be between 1 and 4, got {upscale:g}")


def schemes(base: Scheme, policy: ImagePolicy | None, num_pictures: int) -> list[Scheme]:
    """The scheme of each picture of a prompt. An any-resolution scheme has no second grid: ``msac`` changes nothing."""
    if policy is None or policy == ImagePolicy():
        return [base] * num_pictures
    limited = base
    if policy.max_tiles is not None:
        most = max(1, min(policy.max_tiles, SHARED_TILES // max(num_pictures, 1)))
        limited = (
            replace(base, max_tiles=most, min_tiles=min(base.min_tiles, most))
            if isinstance(base, Tiling)
            else replace(base, max_tiles=most)
        )
    if policy.msac and num_pictures == 1 and isinstance(limited, Tiling):
        limited = replace(limited, msac=True)
    return [replace(limited, upscale=policy.upscale) if index == 0 else limited for index in range(num_pictures)]


# ---- tiles ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """All (columns, rows) within the limits, in order of tile count, then columns."""
    found = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(found, key=lambda pair: pair[0] * pair[1]))


def grid(width: int, height: int, tiling: Tiling) -> Grid:
    """The (columns, rows) a picture of ``width`` x ``height`` pixels is stretched to.

    The nearest aspect ratio wins; on an exact tie the later (larger) grid, as long as the picture covers more than half
    of that grid's pixels. Raises ValueError for an empty picture.
    """
    return _nearest(width, height, tiling, _grids(tiling.min_tiles, tiling.max_tiles))


def grids(width: int, height: int, tiling: Tiling) -> tuple[Grid, ...]:
    """The grids a picture is cut by, in order: one, or two with ``msac``.

    The second is the nearest of those whose columns or rows do not divide the first's, so that its cuts fall elsewhere;
    (1, 1) if there is none. A first grid of one tile is left to the whole picture that ends the tiles.
    """
    first = grid(width, height, tiling)
    if not tiling.msac:
        return (first,)
    others = tuple(
        (columns, rows)
        for columns, rows in _grids(tiling.min_tiles, tiling.max_tiles)
        if first[0] % columns or first[1] % rows
    )
    second = _nearest(width, height, tiling, others)
    return (second,) if first == (1, 1) else (first, second)


def _nearest(width: int, height: int, tiling: Tiling, candidates: Sequence[Grid]) -> Grid:
    _check_picture(width, height)
    aspect = width / height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in candidates:
        distance = abs(aspect - columns / rows)
        covers = width * height > 0.5 * tiling.side * tiling.side * columns * rows
        if distance < best_distance or (distance == best_distance and covers):
            best, best_distance = (columns, rows), distance
    return best


def _check_picture(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"a picture needs at least one pixel, got {width} x {height}")


def has_thumbnail(cuts: Sequence[Grid], tiling: Tiling) -> bool:
    """Whether the whole picture follows the tiles of these grids."""
    return tiling.msac or (tiling.thumbnail and cuts[0] != (1, 1))


def tile_boxes(columns: int, rows: int, side: int) -> list[tuple[int, int, int, int]]:
    """Crop boxes (left, upper, right, lower) in pixels of the stretched picture, row by row."""
    return [
        (column * side, row * side, (column + 1) * side, (row + 1) * side)
        for row in range(rows)
        for column in range(columns)
    ]


# ---- any resolution -------------------------------------------------------------------------------------------


def patch_grid(width: int, height: int, scheme: AnyRes, frame: bool = False) -> Grid:
    """(rows, columns) in patches that a picture of ``width`` x ``height`` pixels is resized to, whole tokens both.

    Sides keep their ratio and are rounded to the nearest whole token, at least one; ``upscale`` is not applied (see
    ``grid_of``). Raises ValueError for an empty picture.
    """
    _check_picture(width, height)
    cell, limit = scheme.patch * scheme.merge, scheme.side if frame else scheme.max_side
    scale = min(1.0, limit / max(width, height)) / cell
    columns, rows = (max(1, math.floor(side * scale + 0.5)) for side in (width, height))
    budget = columns * rows if scheme.max_tiles is None else scheme.max_tiles * scheme.tokens_per_tile
    if columns * rows > budget:
        # Float error must not cost a whole token where the area fits exactly.
        scale *= min(1.0, math.sqrt(budget / (width * height * scale * scale))) * (1 + 1e-9)
        columns, rows = (max(1, math.floor(side * scale)) for side in (width, height))
        # A side of one token cannot shrink; the longer one gives way.
        longest = budget // min(columns, rows)
        columns, rows = min(columns, longest), min(rows, longest)
    return rows * scheme.merge, columns * scheme.merge


# ---- both -----------------------------------------------------------------------------------------------------


def enlarged(width: int, height: int, scheme: Scheme) -> tuple[int, int]:
    """(width, height) in pixels after ``upscale``, as far as ``MAX_UPSCALED_PIXELS`` allows."""
    factor = max(1.0, min(scheme.upscale, math.sqrt(MAX_UPSCALED_PIXELS / max(width * height, 1))))
    return int(width * factor), int(height * factor)


def grid_of(width: int, height: int, scheme: AnyRes, frame: bool = False) -> Grid:
    """(rows, columns) in patches of a picture as it is seen: ``upscale`` applied, except to a video frame."""
    size = (width, height) if frame else enlarged(width, height, scheme)
    return patch_grid(*size, scheme, frame)


def num_tiles(width: int, height: int, scheme: Scheme, frame: bool = False) -> int:
    """Tiles a picture becomes, the thumbnail included; a video frame is always one tile.

    At any resolution it is the picture's area in tiles of ``side``, rounded up: a measure for budgets.
    """
    if isinstance(scheme, AnyRes):
        return -(-math.prod(grid_of(width, height, scheme, frame)) // (scheme.side // scheme.patch) ** 2)
    if frame:
        return 1
    cuts = grids(*enlarged(width, height, scheme), scheme)
    return sum(columns * rows for columns, rows in cuts) + has_thumbnail(cuts, scheme)


def num_image_tokens(width: int, height: int, scheme: Scheme, frame: bool = False) -> int:
    """Tokens a picture takes in the prompt: its image tokens and the two tags around them."""
    if isinstance(scheme, Tiling):
        return scheme.tokens_per_tile * num_tiles(width, height, scheme, frame) + 2
    return math.prod(grid_of(width, height, scheme, frame)) // scheme.merge**2 + 2
