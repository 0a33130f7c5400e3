"""The load-balancing loss of sparse layers, exact over all lanes of a step however they are spread over processes.

Per layer, E * sum over experts of f_e P_e: f_e is the fraction of choices that fell on expert e, P_e the mean
probability that the router gives it (Switch Transformers, arXiv 2101.03961; "global batch" balance as in arXiv
2501.11873; the report, arXiv 2509.14033, names an auxiliary loss and not its batch). It is 1 when experts are used
alike.

f is that of the *previous* step, of all lanes: one's own would have to be known before the first backward pass, or
would be that of a micro-batch, and then what is learned would depend on how many processes share the step. P is a sum
over tokens, so micro-batches and processes just add up: sum of ``balance_loss`` over all of them is the loss of the
step.

Only the routers learn from it: their inputs are taken as given, and neither experts nor attention nor a projector
change to please a router. So it does nothing where the language model is frozen or learns through adapters.

Cost: one more product with each router's weights, [N, D] x [D, E], and N E probabilities in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sailvl.model.moe import shape, sparse_layers


@dataclass(kw_only=True)
class RouterTerms:
    """What the forward passes so far did, in L sparse layers of E experts (L = E = 0 of a dense model).

    ``counts`` int64 [L, E]: how often each expert was chosen. ``sums``: a layer's differentiable sums [E] of router
    probabilities, of each forward pass since ``take``.
    """

    counts: torch.Tensor
    sums: list[list[torch.Tensor]] = field(default_factory=list)

    def take(self) -> torch.Tensor:
        """Sums of router probabilities [L, E] since the last call: one micro-batch's, to be differentiated with it."""
        taken, self.sums = self.sums, [[] for _ in self.sums]
        if not any(taken):
            return torch.zeros(self.counts.shape, device=self.counts.device)
        return torch.stack([torch.stack(layer).sum(dim=0) for layer in taken])


@contextmanager
def router_terms(model: nn.Module) -> Iterator[RouterTerms]:
    """Collect routers' choices and probabilities from the language model's forward passes inside the context.

    Choices count once: activation checkpointing runs routers again during backward, outside of any forward pass. (It
    must be the kind that is not reentrant: the other makes no graph in the forward pass.) A dense model has no terms.
    """
    blocks = sparse_layers(model)
    lm: Any = getattr(model, "model", model).language_model
    device = next(lm.parameters()).device
    size = shape(blocks) if blocks else (0, 0)
    terms = RouterTerms(counts=torch.zeros(size, dtype=torch.long, device=device), sums=[[] for _ in blocks])
    running = False

    def begin(*_: Any) -> None:
        nonlocal running
        running = True

    def end(*_: Any) -> None:
        nonlocal running
        running = False

    def note(row: int) -> Any:
        def hook(gate: nn.Module, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
            # Also when run again: the pass that recomputes must save the same tensors as the first.
            sums_E = _probability_sums(gate, args[0])
            if running:
                terms.sums[row].append(sums_E)
                ids = output[2].detach().reshape(-1)
                terms.counts = terms.counts.to(ids.device)  # elsewhere at first if weights wait in host memory
                terms.counts[row].scatter_add_(0, ids, torch.ones_like(ids))

        return hook

    handles = [lm.register_forward_pre_hook(begin), lm.register_forward_hook(end, always_call=True)]
    gates: list[Any] = [block.gate for block in blocks.values()]
    handles += [gate.register_forward_hook(note(row)) for row, gate in enumerate(gates)]
    try:
        yield terms
    finally:
        for handle in handles:
            handle.remove()


def _probability_sums(gate: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = gate.weight  # type: ignore[assignment]
    logits_NE = F.linear(hidden.detach().reshape(-1, hidden.shape[-1]), weight)
    return logits_NE.softmax(dim=-1, dtype=torch.promote_types(logits_NE.dtype, torch.float32)).sum(dim=0)


def fractions(counts_LE: torch.Tensor) -> torch.Tensor:
    """f: the share of each layer's choices that fell on each expert, fp32 [L, E]; 0 in a layer that chose nothing."""
    total_L1 = counts_LE.sum(dim=-1, keepdim=True)
    return (counts_LE.to(torch.float64) / total_L1.clamp(min=1)).to(torch.float32)


def balance_loss(prob_sums_LE: torch.Tensor, fractions_LE: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """This micro-batch's share of sum over layers of E sum_e f_e P_e: a scalar.

    ``num_tokens`` are all tokens of the step, over all lanes and processes, so that shares add up to the loss.
    """
    num_experts = prob_sums_LE.shape[1]
    return num_experts * (fractions_LE.to(prob_sums_LE) * prob_sums_LE).sum() / max(num_tokens, 1)
