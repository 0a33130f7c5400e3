"""Encoded samples to one packed batch: documents end to end, none padded, none cut.

Every document restarts its positions and is one segment of ``cu_seqlens``, so that attention never crosses documents.
Only the rows that predict a supervised token are listed: the loss needs no other.

Packing puts documents of very different lengths into one step, so what counts alike is a choice (``Weighting``). A
row's weight depends on its own document alone, never on the pack it came in. The report names no weighting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch

from sailvl.types import Batch, Example, Reject

IGNORED = -100
"""The target of a position that is not trained on."""

Weighting = Literal["token", "sample", "sqrt"]
"""What counts alike in the loss: supervised tokens; documents; or, in between, a document of n tokens as sqrt(n)."""

_POWERS: Mapping[Weighting, float] = {"sample": -1.0, "sqrt": -0.5}
"""Of the document's number of supervised tokens: the weight of each of them."""


def collate(
    examples: Sequence[Example],
    lane: int,
    state: Mapping[str, Any],
    rejects: Sequence[Reject] = (),
    weighting: Weighting = "token",
) -> Batch:
    """One pack as tensors (shapes: ``Batch``). Without a single tile, tiles_N3SS is [0, 3, S, S].

    weights_R stays None when tokens count alike. A document without a supervised token has no row, so no weight.
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
        weights_R=_weights(examples, weighting),
    )


def _weights(examples: Sequence[Example], weighting: Weighting) -> torch.Tensor | None:
    """float32 [R]: n**-1 or n**-0.5 for each of the n supervised tokens of each document."""
    if weighting == "token":
        return None
    counts = np.array([np.count_nonzero(example.targets_T != IGNORED) for example in examples])
    weights = np.maximum(counts, 1) ** _POWERS[weighting]
    return torch.from_numpy(np.repeat(weights.astype(np.float32), counts))
