"""Pixel shuffle and projector: patch features of a tile or picture to tokens of the language model.

Every ``merge`` x ``merge`` square of patches becomes one token (1,024 patches to 256 at 448 pixels), then LayerNorm,
Linear, GELU, Linear (technical report arXiv 2509.14033, section 2.2: the "adapter"). Within a token the features are
ordered by row of the square, then column, then width: what the published "v2" shuffle yields, whose two transpositions
cancel out into one reshape and permutation here.

Cost: a copy of the features and 33.6 MFLOP per token at the 2B shape.
Annotations must stay real objects (no postponed evaluation): the library inspects them.
"""

from collections.abc import Sequence

import torch
from torch import nn


def pixel_shuffle(features_NPD: torch.Tensor, merge: int) -> torch.Tensor:
    """[N, P, D] to [N, P / merge^2, D * merge^2]; P must be the square of a multiple of ``merge`` (ValueError)."""
    tiles, patches, width = features_NPD.shape
    side = round(patches**0.5)
    if side * side != patches or side % merge:
        raise ValueError(f"{patches} patches do not form a square of {merge} x {merge} cells")
    cells = side // merge
    squares = features_NPD.reshape(tiles, cells, merge, cells, merge, width).permute(0, 1, 3, 2, 4, 5)
    return squares.reshape(tiles, cells * cells, merge * merge * width)


def pixel_shuffle_ragged(features_PD: torch.Tensor, grids: Sequence[tuple[int, int]], merge: int) -> torch.Tensor:
    """[patches of all pictures, D] to [their tokens, D * merge^2], in the order within a token of ``pixel_shuffle``.

    ``grids`` holds each picture's (rows, columns) in patches, multiples of ``merge`` (ValueError); patches and tokens
    run row by row within a picture, and the pictures follow each other.
    """
    width = features_PD.shape[-1]
    odd = [grid for grid in grids if grid[0] % merge or grid[1] % merge]
    if odd:
        raise ValueError(f"a grid of {odd[0][0]} x {odd[0][1]} patches does not divide into {merge} x {merge} cells")
    parts = [features_PD[:0].reshape(0, merge * merge * width)]
    for (rows, columns), part in zip(grids, features_PD.split([r * c for r, c in grids]) if grids else (), strict=True):
        squares = part.reshape(rows // merge, merge, columns // merge, merge, width).permute(0, 2, 1, 3, 4)
        parts.append(squares.reshape(-1, merge * merge * width))
    return torch.cat(parts)


class SailVLProjector(nn.Module):
    """Merged patch features [..., tokens, merge^2 * D_vit] to token embeddings [..., tokens, D_lm]."""

    def __init__(self, vit_width: int, lm_width: int, merge: int):
        super().__init__()
        merged = vit_width * merge**2
        self.layer_norm = nn.LayerNorm(merged)
        self.linear_1 = nn.Linear(merged, lm_width)
        self.linear_2 = nn.Linear(lm_width, lm_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(self.layer_norm(features))))
