"""The carriers every layer speaks, and the legend of the shape suffixes.

Suffixes of array and tensor names: T packed tokens, N tiles (at any resolution patches; in grids_N2 pictures),
P patches per tile, D width, H heads, K head size, V vocabulary, E experts, B batch, S side in pixels, R supervised rows
(positions that predict a supervised token).
Counts are ``num_*``, limits ``max_*``, and every size says its unit: ``max_tokens``, ``num_tiles``.

Nothing here imports torch, so that recipes, plans and verifiers start at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sailvl.config import value

if TYPE_CHECKING:
    import numpy as np
    import torch

IMAGE_PLACEHOLDER = "<image>"
"""Stands in a message's text where a picture goes; pictures are used in order."""

VIDEO_PLACEHOLDER = "<video>"
"""Stands where a clip goes in data files and literal prompts; in a Record its frames are pictures like others."""


class RecordError(ValueError):
    """A record that cannot be used; the message names the record, what is wrong, and the counts involved."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. ``text`` may hold ``IMAGE_PLACEHOLDER``; every other special string in it is escaped when encoded."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A still picture, or one frame of a clip, by reference: sizes in pixels are known before anything is decoded.

    ``ref`` is whatever the record's source needs to produce the pixels (a path, bytes, a scene to draw).
    A ``frame`` takes exactly one tile and is labelled ``Frame-i``; a still picture is tiled.
    """

    width: int
    height: int
    ref: Any
    frame: bool = False


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample as stored: a conversation and the pictures it talks about."""

    id: str
    messages: tuple[Message, ...]
    pictures: tuple[Picture, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One encoded sample. ``targets_T[i]`` is the token that position i must predict, or -100.

    ids_T int64, targets_T int64, tiles_N3SS float32 (normalised pixels). For a model of any resolution tiles_N3SS
    holds patches, S their side, and grids_N2 int64 [pictures, 2] the rows and columns of patches of each picture;
    ``patches_per_tile`` make one of ``num_tiles``, each picture rounded up.
    """

    id: str
    ids_T: np.ndarray
    targets_T: np.ndarray
    tiles_N3SS: np.ndarray
    grids_N2: np.ndarray | None = None
    patches_per_tile: int = 1

    @property
    def num_tokens(self) -> int:
        return len(self.ids_T)

    @property
    def num_tiles(self) -> int:
        return _num_tiles(self)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A planned sample: which row of which source, and how much room it takes. No pixels, no tokens."""

    source: str
    row: int
    num_tokens: int
    num_tiles: int


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Several samples planned into one sequence, and the lane's state *after* drawing them (JSON-able)."""

    lane: int
    items: tuple[Item, ...]
    state: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    @property
    def num_tiles(self) -> int:
        return sum(item.num_tiles for item in self.items)


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A sample that was masked or dropped, and why."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One pack as tensors.

    ids_T int64; positions_T int64, restarting at 0 in every document; cu_seqlens int32 [documents + 1], offsets of
    the documents in T; max_length tokens of the longest document; tiles_N3SS float32; rows_R int64, the positions
    whose hidden state predicts a supervised token; targets_R int64, those tokens; grids_N2 int64 and patches_per_tile
    as in ``Example``; weights_R float32, what each row's loss counts (None: all alike).
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    tiles_N3SS: torch.Tensor
    rows_R: torch.Tensor
    targets_R: torch.Tensor
    lane: int
    state: dict[str, Any]
    rejects: tuple[Reject, ...] = ()
    grids_N2: torch.Tensor | None = None
    patches_per_tile: int = 1
    weights_R: torch.Tensor | None = None

    @property
    def num_samples(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def num_tiles(self) -> int:
        return _num_tiles(self)


def _num_tiles(seen: Example | Batch) -> int:
    """Tiles; at any resolution the area of every picture in tiles, rounded up."""
    if seen.grids_N2 is None:
        return len(seen.tiles_N3SS)
    return sum(-(-rows * columns // seen.patches_per_tile) for rows, columns in seen.grids_N2.tolist())


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model answered: text (grounding marks kept, end token not), generated token ids, and why it stopped.

    ``logprobs`` are those of ``ids`` in nats, when asked for; an engine that only sees text has neither.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "cancelled"]
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Question:
    """A record without its answer, the truth, and how an answer is judged.

    ``chance`` is the expected score of an answer that ignores the picture, in [0, 1).
    """

    record: Record
    truth: str
    family: str
    lang: Literal["en", "zh"]
    verifier: Literal["exact", "number", "choice", "iou", "edit"]
    chance: float


@value
class Mixture:
    """Named shares of sources: the fraction of *samples* drawn from each; they sum to 1 within 1e-6.

    The shares are kept sorted by name, so that two mixtures of one content draw the same order.
    """

    shares: dict[str, float]

    def __post_init__(self) -> None:
        wrong = [f"{name}={share:g}" for name, share in self.shares.items() if not 0 < share <= 1]
        if wrong:
            raise ValueError(
                f"every share must be above 0 and at most 1, not {', '.join(wrong)}; leave a source out to skip it"
            )
        total = math.fsum(self.shares.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"shares must sum to 1, not {total:.6g}")
        object.__setattr__(self, "shares", dict(sorted(self.shares.items())))
