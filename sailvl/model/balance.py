"""How evenly the experts are used by text and by multimodal samples, and making it more even.

The report (arXiv 2509.14033, section 2) tunes routing "distribution-aware": it calibrates on language data until the
entropy of expert activation is highest, which keeps the behaviour on text and raises the entropy on multimodal samples;
it gives no procedure. Ours: ``calibrate`` moves a bias per expert (``moe.set_bias``: it takes part in the choice of
experts, not in their weights) by a step towards the experts that multimodal samples use less than the mean, and takes a
move back in any layer where the load of text samples would drift too far.

Cost: a round of calibration is one forward pass over both sets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .moe import expert_blocks, record_routing, set_bias, shape, sparse_layers

Inputs = Iterable[Mapping[str, Any]]
"""Keyword arguments of the model's forward pass, one mapping per pass; read more than once."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One sparse layer: entropy of the load in [0, 1] and experts never chosen, on text and on multimodal samples."""

    layer: int
    text: float
    multimodal: float
    text_unused: int
    multimodal_unused: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """``bias`` [L, E] in effect afterwards; reports before and after; per layer how far the text load moved (nats)."""

    bias: torch.Tensor
    before: tuple[LayerReport, ...]
    after: tuple[LayerReport, ...]
    text_kl: tuple[float, ...]
    rounds: int


def expert_load(counts: torch.Tensor) -> torch.Tensor:
    """Shares of the choices that fell on each expert, from counts [..., E]; each row sums to 1."""
    return counts.to(torch.float64) / counts.sum(dim=-1, keepdim=True)


def entropy(load: torch.Tensor) -> torch.Tensor:
    """-sum p ln p / ln E of loads (or counts) [..., E]: 1 if all experts are used alike, 0 if one does everything."""
    if load.shape[-1] == 1:
        return torch.ones(load.shape[:-1], dtype=torch.float64)
    return torch.special.entr(expert_load(load)).sum(dim=-1) / math.log(load.shape[-1])


@torch.no_grad()
def measure(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """How often each expert is chosen, int64 [L, E] on the CPU, over forward passes with ``inputs``."""
    base = getattr(model, "model", model)
    with record_routing(model, keep_ids=False) as routing:
        for kwargs in inputs:
            base(**kwargs, use_cache=False)
    if not routing.counts.sum():
        raise ValueError("no tokens to measure the experts' load on")
    return routing.counts.cpu()


def entropy_report(model: nn.Module, text: Inputs, multimodal: Inputs) -> tuple[LayerReport, ...]:
    """How evenly both sets use the experts, layer by layer."""
    return _report(model, measure(model, text), measure(model, multimodal))


def calibrate(
    model: nn.Module,
    text: Inputs,
    multimodal: Inputs,
    *,
    step: float | None = None,
    rounds: int = 32,
    max_kl: float = 0.02,
) -> Calibration:
    """Even out the load of ``multimodal`` samples by a router bias, and leave the best one found in the model.

    step: change per round, in units of the scores (default a tenth of the mean score, 0.1 / E); halved in a layer that
    stops improving. max_kl: in no layer may KL(text load before || after) exceed this, in nats; a layer that would
    takes its move back and halves its step. The result is the bias of the highest mean entropy among those within the
    guard, the present one included: it is never less even than what was there. Biases are kept to bf16, so that casting
    the model does not change a choice.
    """
    blocks = expert_blocks(model)
    bias = torch.zeros(shape(blocks))
    if model.config.router_bias is not None:
        bias = torch.tensor(model.config.router_bias)
    steps = torch.full((len(blocks), 1), 0.1 / bias.shape[1] if step is None else step)
    text_before, multimodal_now = measure(model, text), measure(model, multimodal)
    before = best_report = _report(model, text_before, multimodal_now)
    best, best_kl, best_entropy = bias, torch.zeros(len(blocks)), entropy(multimodal_now).mean()
    for _ in range(rounds):
        load = expert_load(multimodal_now)
        trial = bias + steps * torch.sign(1 / load.shape[1] - load).float()
        set_bias(model, _rounded(trial))
        text_now, multimodal_next = measure(model, text), measure(model, multimodal)
        kl = _divergence(text_before, text_now)
        over = kl > max_kl
        if not over.any() and entropy(multimodal_next).mean() > best_entropy:
            best, best_kl, best_entropy = trial, kl, entropy(multimodal_next).mean()
            best_report = _report(model, text_now, multimodal_next)
        stalled = over | (entropy(multimodal_next) <= entropy(multimodal_now))
        bias = torch.where(over[:, None], bias, trial)
        steps = torch.where(stalled[:, None], steps / 2, steps)
        multimodal_now = torch.where(over[:, None], multimodal_now, multimodal_next)
    set_bias(model, _rounded(best))
    return Calibration(
        bias=_rounded(best), before=before, after=best_report, text_kl=tuple(best_kl.tolist()), rounds=rounds
    )


def _rounded(bias: torch.Tensor) -> torch.Tensor:
    return bias.to(torch.bfloat16).float()


def _divergence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """KL(before || after) [L] in nats of loads from counts; one is added to each, for experts never chosen."""
    p, q = expert_load(before + 1), expert_load(after + 1)
    return (p * (p / q).log()).sum(dim=-1)


def _report(model: nn.Module, text: torch.Tensor, multimodal: torch.Tensor) -> tuple[LayerReport, ...]:
    even = [entropy(counts).tolist() for counts in (text, multimodal)]
    unused = [(counts == 0).sum(dim=-1).tolist() for counts in (text, multimodal)]
    return tuple(
        LayerReport(layer=layer, text=a, multimodal=b, text_unused=c, multimodal_unused=d)
        for layer, a, b, c, d in zip(sparse_layers(model), *even, *unused, strict=True)
    )
