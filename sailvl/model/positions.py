"""Where a patch lies: the learned table at any size of picture, and the rotary embedding of rows and columns.

The technical report (arXiv 2509.14033, section 2.1) resizes pre-trained position embeddings to the picture, as a prior
of the whole that extrapolates; its figure of the any-resolution encoder says "Interpolate 2D RoPE". Both are here.

Cost: one small interpolation per shape of picture, and four multiplications per feature of queries and keys.
Annotations must stay real objects (no postponed evaluation): the library inspects them.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from .configuration import SailViTConfig

_POSITION_AMPLITUDE = 1.0
"""Amplitude of a fresh position table: as large as the patch features, which have unit RMS."""


def sincos(config: SailViTConfig) -> torch.Tensor:
    """A 2-D sine-cosine table (1, P, D): half the width tells the row, half the column.

    Wavelengths run from two pi patches to two pi sides: longer ones would be the same everywhere on the grid.
    """
    per_axis, count = config.image_size // config.patch_size, config.hidden_size // 4
    steps = torch.exp(-math.log(per_axis) * torch.arange(count) / max(count, 1))
    angles = torch.arange(per_axis)[:, None] * steps
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None, :].expand(per_axis, per_axis, -1)
    columns = axis[None, :, :].expand(per_axis, per_axis, -1)
    table = torch.cat([rows, columns], dim=-1).reshape(1, per_axis * per_axis, 4 * count)
    padded = torch.zeros(1, per_axis * per_axis, config.hidden_size)
    padded[..., : 4 * count] = table
    return _POSITION_AMPLITUDE * padded


def stretched(table_1PD: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The table of a square grid at the patches of pictures of ``grids`` (rows, columns): (1, all patches, D).

    Bicubic, in fp32; bit for bit the table itself where the grid is its own.
    """
    side = math.isqrt(table_1PD.shape[1])
    square = table_1PD.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    square = square if square.dtype == torch.float64 else square.float()
    tables = {(side, side): table_1PD[0]}
    for grid in dict.fromkeys(grid for grid in grids if grid not in tables):
        table = nn.functional.interpolate(square, size=grid, mode="bicubic", align_corners=False)
        tables[grid] = table.flatten(2)[0].t().to(table_1PD.dtype)
    # No picture: an empty part of the table, so that it has a (zero) gradient all the same.
    return torch.cat([table_1PD[0, :0], *(tables[grid] for grid in grids)])[None]


def turns(config: SailViTConfig, grids: Sequence[tuple[int, int]], like: torch.Tensor) -> torch.Tensor | None:
    """Cosines and sines [2, patches, 1, K / 2] of the 2-D rotary embedding, on ``like``'s device; None without it.

    Of the K / 2 pairs of a head the first half turns with the row and the second with the column, in patches, the i-th
    of each half by theta^(-i / (K / 4)) a patch.
    """
    if not config.rope_2d:
        return None
    count = config.hidden_size // config.num_attention_heads // 4
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    speeds = config.rope_theta ** -(torch.arange(count, dtype=dtype, device=like.device) / count)
    places = [torch.zeros(0, 2, dtype=dtype, device=like.device)]
    for grid in grids:
        axes = (torch.arange(length, dtype=dtype, device=like.device) for length in grid)
        places.append(torch.cartesian_prod(*axes))
    angles = (torch.cat(places)[:, :, None] * speeds).flatten(1)[:, None]
    return torch.stack([angles.cos(), angles.sin()])


def turn(heads_NPHK: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
    """Queries or keys, each pair (i, i + K / 2) of a head turned by its patch's angle."""
    (cos, sin), (first, second) = turned.unbind(0), heads_NPHK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(heads_NPHK.dtype)
