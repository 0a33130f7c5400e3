"""The loss on held-out packs, the same ones every time, while a stage trains, without disturbing it by a single bit.

Pack i is the first pack of lane i of ``packs`` lanes over the held-out sources: it depends on the stage alone, not on
how many processes there are. Process r of W has packs r, r + W, ... and keeps them in memory (their pictures, mostly).
Every process calls the model equally often, as sharded weights demand: one that runs out of packs sees one again, and
its answer does not count.

The loss is that of the report's metric: nats per supervised token, every token alike, whatever the stage's weighting.
Training mode and random generators are put back; the data stream of training is another one, and is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sailvl import dist
from sailvl.curriculum import Train
from sailvl.data.encode import Processor
from sailvl.data.loader import Loader
from sailvl.data.source import Source
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.train import step
from sailvl.train.shards import reshard
from sailvl.train.state import TrainState, rng_state, set_rng_state
from sailvl.types import Batch

BUFFER = 64
"""Samples a pack is chosen from: enough to fill it, and quickly read."""

LossSum = Callable[[SailVLForConditionalGeneration, Batch, str], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """This process's packs, and whether each counts; as many on every process."""

    packs: tuple[Batch, ...]
    counts: tuple[bool, ...]


def held_out(stage: Train, sources: Mapping[str, Source], processor: Processor) -> HeldOut:
    """Read this process's packs of ``stage.validation``: once per stage; ValueError if it has none.

    Raises RecordError if every row of a source is unusable.
    """
    validation = stage.validation
    if validation is None:
        raise ValueError(f"stage {stage.name} has no validation")
    total, world = validation.packs, dist.world_size()
    turns = range(dist.rank(), -(-total // world) * world, world)
    return HeldOut(
        packs=tuple(_pack(stage, validation.data.shares, sources, processor, turn % total, total) for turn in turns),
        counts=tuple(turn < total for turn in turns),
    )


def _pack(
    stage: Train, shares: Mapping[str, float], sources: Mapping[str, Source], processor: Any, number: int, total: int
) -> Batch:
    """Pack ``number`` of ``total``: as if that many processes shared the lanes, and this were that one."""
    loader = Loader(
        sources,
        shares,
        processor,
        max_tokens=stage.max_tokens,
        max_tiles=stage.max_tiles,
        lanes=total,
        buffer=BUFFER,
        seed=stage.seed,
        rank=number,
        world_size=total,
    )
    with closing(loader):
        return next(loader)[0]


def held_out_loss(state: TrainState, held: HeldOut, *, loss_sum: LossSum = step.loss_sum) -> float | None:
    """Mean nats per supervised token over the held-out packs, the same bits on all processes; None if nothing is
    supervised. It is noted in ``state.held_out`` with the step. All processes must call it.
    """
    loss = mean_loss(state.model, held, state.precision, loss_sum=loss_sum)
    if loss is not None:
        state.held_out = (state.step, loss)
    return loss


def mean_loss(
    model: SailVLForConditionalGeneration, held: HeldOut, precision: str, *, loss_sum: LossSum = step.loss_sum
) -> float | None:
    """As ``held_out_loss``, of any model."""
    own = [0.0, 0.0]
    with _undisturbed(model), torch.no_grad():
        for pack, counts in zip(held.packs, held.counts, strict=True):
            loss = loss_sum(model, pack, precision)
            if counts:
                own = [own[0] + float(loss), own[1] + len(pack.targets_R)]
    total, tokens = dist.sums(own)
    return total / tokens if tokens else None


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode in the block; then every module's own mode, the random generators, and the shards as before."""
    modes, rng = [(module, module.training) for module in model.modules()], rng_state()
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        set_rng_state(rng)
        reshard(model)
