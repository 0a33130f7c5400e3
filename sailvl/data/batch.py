"""Encoded samples to one packed batch: documents end to end, none padded, none cut.

Every document restarts its positions and is one segment of ``cu_seqlens``, so that attention never crosses documents.
Only the rows that predict a supervised token are listed: the loss needs no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from sailvl.types import Batch, Example, Reject

IGNORED = -100
"""The target of a position that is not trained on."""


def collate(examples: Sequence[Example], lane: int, state: Mapping[str, Any], rejects: Sequence[Reject] = ()) -> Batch:
    """One pack as tensors (shapes: ``Batch``). Without a single tile, tiles_N3SS is [0, 3, S, S].

    Raises ValueError for no example, or for examples of tiles and of any resolution in one batch.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    if len({(example.grids_N2 is None, example.patches_per_tile) for example in examples}) > 1:
        raise ValueError(f"the {len(examples)} examples of a batch were made by different processors")
    lengths = [example.num_tokens for example in examples]
    targets_T = np.concatenate([example.targets_T for example in examples])
    rows_R = np.flatnonzero(targets_T != IGNORED)
    grids = [example.grids_N2 for example in examples if example.grids_N2 is not None]
    return Batch(
        ids_T=torch.from_numpy(np.concatenate([example.ids_T for example in examples])),
        positions_T=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        max_length=max(lengths),
        tiles_N3SS=torch.from_numpy(np.concatenate([example.tiles_N3SS for example in examples])),
        rows_R=torch.from_numpy(rows_R),
        targets_R=torch.from_numpy(targets_T[rows_R]),
        lane=lane,
        state=dict(state),
        rejects=tuple(rejects),
        grids_N2=torch.from_numpy(np.concatenate(grids)) if grids else None,
        patches_per_tile=examples[0].patches_per_tile,
    )
