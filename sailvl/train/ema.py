"""An exponential moving average of the trained weights: often a better model than the last step's, at no extra pass.

After step t (from 1) average = d average + (1 - d) weights with d = min(decay, (1 + t) / (10 + t)): the first averages
forget fast, or thousands of steps would pass before the random start is gone. This warm-up is the one most published
trainings use; the report (arXiv 2509.14033) has no average of this kind, only soups of finished models.

Each process averages its own shards, by element, so sharded and unsharded averages are equal bit for bit. Averages are
fp32 (fp64 for fp64 weights), on the weights' device: 4 bytes per trained parameter divided by the processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sailvl.train.shards import local, named_parameters, reshard


@dataclass(kw_only=True)
class Ema:
    """``weights`` are by parameter name, what this process holds of each; ``updates`` counts the steps averaged."""

    decay: float
    weights: dict[str, torch.Tensor]
    updates: int = 0


def start(model: torch.nn.Module, decay: float) -> Ema:
    """An average of the parameters that can learn now (after freezing and sharding), equal to them.

    Raises ValueError unless 0 < decay < 1.
    """
    if not 0 < decay < 1:
        raise ValueError(f"an average needs a decay between 0 and 1, not {decay}")
    return Ema(decay=decay, weights={name: _wide(value).clone() for name, value in _trained(model)})


@torch.no_grad()
def update(ema: Ema, model: torch.nn.Module) -> None:
    """Take in the weights after an optimizer step; one more tensor of each size is in memory for a moment."""
    ema.updates += 1
    decay = min(ema.decay, (1 + ema.updates) / (10 + ema.updates))
    for name, value in _trained(model):
        # Two products and a sum, each rounded once: a fused operation may round elsewhere in a row's last elements,
        # and which elements are last depends on the shard.
        ema.weights[name].mul_(decay).add_(_wide(value) * (1 - decay))


@contextmanager
def swapped(ema: Ema, model: torch.nn.Module) -> Iterator[None]:
    """Within the block the model has the averaged weights: to export or validate them. Then its own, bit for bit.

    Its own weights wait in host memory.
    """
    chosen = [(name, local(p)) for name, p in named_parameters(model) if name in ema.weights]
    own = {name: value.to("cpu", copy=True) for name, value in chosen}
    try:
        for name, value in chosen:
            value.copy_(ema.weights[name])
        reshard(model)
        yield
    finally:
        for name, value in chosen:
            value.copy_(own[name])
        reshard(model)


def _trained(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, local(p)) for name, p in named_parameters(model) if p.requires_grad)


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == torch.float64 else value.float()
