"""Logits to tokens: what ``Sampling`` asks for, on the rows of a batch at once.

In this order: banned tokens out, log-probabilities taken, penalties, temperature, top-k, top-p, min-p, a draw. A
log-probability is thus the model's own, over all tokens it may say, whatever the temperature and the penalties were.
Rows that share temperature and limits are drawn together; a greedy row costs an argmax.

A draw inverts the cumulative distribution at a number from the answer's own generator (Python's, which is the same on
every machine and device), so neither the other rows nor their order can change it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sailvl.engine.base import Sampling


@dataclass(frozen=True)
class Choice:
    """A token, its log-probability, and the most likely (token, log-probability) pairs; the latter two if asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """What one answer's choices depend on: its limits, its generator, and the tokens said so far."""

    def __init__(self, sampling: Sampling, index: int, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self.random = random.Random(None if sampling.seed is None else f"{sampling.seed}/{index}")
        self.penalised = (
            sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        )
        # Repeating is measured against prompt and answer, presence and frequency against the answer alone.
        self.seen = set(prompt) if sampling.repetition_penalty != 1 else set[int]()
        self.counts: dict[int, int] = {}

    def chose(self, id: int) -> None:
        """Remember a token that was said."""
        if self.penalised:
            self.counts[id] = self.counts.get(id, 0) + 1
            if self.sampling.repetition_penalty != 1:
                self.seen.add(id)

    def penalise(self, logits_V: torch.Tensor) -> None:
        """Lower the logits of tokens said before, in place."""
        sampling = self.sampling
        if self.seen:
            ids = torch.tensor(list(self.seen), device=logits_V.device)
            logits = logits_V[ids]
            factor = sampling.repetition_penalty
            logits_V[ids] = torch.where(logits > 0, logits / factor, logits * factor)
        if self.counts and (sampling.presence_penalty or sampling.frequency_penalty):
            ids = torch.tensor(list(self.counts), device=logits_V.device)
            times = torch.tensor(list(self.counts.values()), device=logits_V.device, dtype=logits_V.dtype)
            logits_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times


@torch.inference_mode()
def choose(logits_BV: torch.Tensor, choosers: Sequence[Chooser]) -> list[Choice]:
    """The next token of every row of ``logits_BV``, banned ones at -inf there; the tensor may be changed."""
    if logits_BV.dtype.itemsize < 4:
        logits_BV = logits_BV.float()
    asked = [row for row, chooser in enumerate(choosers) if chooser.sampling.top_logprobs is not None]
    logprobs = dict(zip(asked, logits_BV[asked].log_softmax(-1), strict=True)) if asked else {}
    for row, chooser in enumerate(choosers):
        if chooser.penalised:
            chooser.penalise(logits_BV[row])
    groups: dict[tuple[float, int, float, float], list[int]] = {}
    for row, chooser in enumerate(choosers):
        sampling = chooser.sampling
        if sampling.temperature > 0:
            limits = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            groups.setdefault(limits, []).append(row)
    ids = logits_BV.argmax(-1).tolist() if sum(map(len, groups.values())) < len(choosers) else [0] * len(choosers)
    for limits, rows in groups.items():
        drawn = draw(logits_BV[rows], [choosers[row].random.random() for row in rows], *limits)
        for row, id in zip(rows, drawn, strict=True):
            ids[row] = id
    for id, chooser in zip(ids, choosers, strict=True):
        chooser.chose(id)
    if not asked:
        return [Choice(id) for id in ids]
    return [
        Choice(id, float(logprobs[row][id]), _most_likely(logprobs[row], choosers[row].sampling.top_logprobs or 0))
        if row in logprobs
        else Choice(id)
        for row, id in enumerate(ids)
    ]


def _most_likely(logprobs_V: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return tuple((id, value) for id, value in pairs if value > float("-inf"))


def draw(
    logits_GV: torch.Tensor, at: Sequence[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> list[int]:
    """A token a row, where the cumulative distribution, cut to the limits, passes the row's number ``at`` in [0, 1)."""
    # The largest logit at 0 first: however small the temperature, it stays finite.
    logits = (logits_GV - logits_GV.amax(-1, keepdim=True)) / temperature
    ids: torch.Tensor | None = None
    if 0 < top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)
    elif top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    weights = logits.softmax(-1)
    if top_p < 1:
        if ids is None:
            raise AssertionError("cut by probability, but not sorted")
        before = weights.cumsum(-1) - weights
        weights = weights.masked_fill(before >= top_p, 0)
    if min_p > 0:
        weights = weights.masked_fill(weights < min_p * weights.amax(-1, keepdim=True), 0)
    passed = weights.cumsum(-1)
    total = passed[:, -1:].clone()
    numbers = torch.tensor(at, dtype=weights.dtype, device=weights.device)[:, None]
    # Rounding may carry a number to the very end; the last token of any weight is where the total is reached.
    last = torch.searchsorted(passed, total)
    picks = torch.searchsorted(passed, numbers * total, right=True).minimum(last).clamp(max=passed.shape[-1] - 1)
    return [int(id) for id in (picks if ids is None else ids.gather(-1, picks))[:, 0].tolist()]
