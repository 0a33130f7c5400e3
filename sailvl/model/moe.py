"""Experts: running those that the router chooses, recording and replaying the choices, and biasing them.

The language model's sparse layers are transformers' Qwen3-MoE (technical report arXiv 2509.14033, section 2): a router
scores every expert by a softmax, the best few are run, and their outputs are summed with those scores as weights.

- ``grouped_experts`` runs the chosen experts as one grouped matrix product, in every precision.
- ``record_routing`` notes the choices of forward passes, ``replay_routing`` forces them on later ones (reinforcement
  learning needs the choices of the rollout: "router replay", arXiv 2510.11370).
- ``set_bias`` adds a bias per expert to the scores by which experts are *chosen*, not to the weights of their outputs
  (``balance.calibrate`` finds one). It lives in the configuration (``router_bias``, none by default): released
  weights lack nothing, saved weights hold nothing that other readers would stumble over, and whoever builds the model
  from its configuration routes with it. A reader that builds its own routers from the weights alone ignores it.

Cost: recording adds one scatter per layer and never waits for the device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from .dispatch import dispatched_experts

EXPERTS = "sailvl_grouped"
"""Name of the experts implementation, the default of models with experts."""

BIAS = "e_score_correction_bias"
"""The router's buffer: the usual name, and the usual meaning, of a bias on softmax scores for choosing alone."""


def grouped_experts(
    experts: nn.Module, hidden_ND: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor:
    """Weighted outputs [N, D] of the chosen experts: grouped matrix products, or in fp64, which they refuse, a loop.

    Autocast passes over grouped products: they would stay in fp32, at 2.2 times the time on a CPU. It is applied here,
    by lending the call a module whose weights are cast. Experts that processes share (``dispatch.share``) run where
    they are kept.
    """
    if getattr(experts, "shared_by", None) is not None:
        return dispatched_experts(experts, hidden_ND, ids_NK, weights_NK, grouped_experts)
    if hidden_ND.dtype == torch.float64:
        return type(experts).forward.__wrapped__(experts, hidden_ND, ids_NK, weights_NK)
    kind = hidden_ND.device.type
    if torch.is_autocast_enabled(kind):
        cast = {name: value.to(torch.get_autocast_dtype(kind)) for name, value in experts.named_parameters()}
        experts = copy.copy(experts)
        experts._parameters = cast
    return grouped_mm_experts_forward(experts, hidden_ND, ids_NK, weights_NK)


ExpertsInterface.register(EXPERTS, grouped_experts)


def sparse_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Layer index to sparse block (``gate``, ``experts``) of a model with or without its head; empty if dense."""
    layers = getattr(model, "model", model).language_model.layers
    return {index: layer.mlp for index, layer in enumerate(layers) if hasattr(layer.mlp, "experts")}


# ---- choices: recorded and replayed -------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Routing:
    """What was recorded. ``layers``: indices of the L sparse layers. ``counts`` int64 [L, E]: how often each expert was
    chosen, padding left out. ``ids``: per forward pass the choices int16 [L, N, K] of all N tokens, padding included.
    """

    layers: tuple[int, ...]
    counts: torch.Tensor
    ids: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def record_routing(model: nn.Module, *, keep_ids: bool = True) -> Iterator[Routing]:
    """Record the experts chosen by the forward passes inside the context.

    A choice counts once: activation checkpointing runs the router again during backward, outside of any forward pass.
    Tokens that a two-dimensional ``attention_mask`` hides do not count. Without ``keep_ids`` only counts are kept.
    Raises ValueError if the model has no experts, or for a prepared mask, which does not say what is padding.
    """
    blocks = expert_blocks(model)
    routing = Routing(
        layers=tuple(blocks),
        counts=torch.zeros(shape(blocks), dtype=torch.long, device=next(_lm(model).parameters()).device),
    )
    running, seen, visible = False, [], None

    def begin(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        nonlocal running, visible
        mask, length = kwargs.get("attention_mask"), kwargs["inputs_embeds"].shape[1]
        visible = None
        if isinstance(mask, torch.Tensor) and mask.numel():
            if mask.ndim != 2:
                raise ValueError("a prepared attention mask does not say which tokens are padding: give [B, T]")
            visible = mask[:, -length:].reshape(-1, 1).long()
        running = True
        seen.clear()

    def note(row: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if not running:
                return
            ids = (kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]).detach()
            times = torch.ones_like(ids) if visible is None else visible.to(ids.device).expand_as(ids)
            routing.counts[row].scatter_add_(0, ids.reshape(-1).to(routing.counts.device), times.reshape(-1))
            if keep_ids:
                seen.append(ids.to(torch.int16))

        return hook

    def end(*_: Any) -> None:
        nonlocal running
        running = False
        if keep_ids:
            routing.ids.append(torch.stack([ids.to(seen[0].device) for ids in seen]))

    lm = _lm(model)
    handles = [
        lm.register_forward_pre_hook(begin, with_kwargs=True),
        lm.register_forward_hook(end),
        # What the experts receive is what was chosen, whoever chose it: router, bias or replay.
        *(
            block.experts.register_forward_pre_hook(note(row), with_kwargs=True)
            for row, block in enumerate(blocks.values())
        ),
    ]
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replay_routing(model: nn.Module, recorded: Sequence[torch.Tensor]) -> Iterator[None]:
    """Choose, in the n-th forward pass inside the context, the experts of ``recorded[n]`` [L, N, K] (any integers).

    Only the choice is replayed: weights come from the current router's scores of those experts, and the router gets its
    gradient. A token with a negative id is routed as usual (a rollout never forwards its last token). Backward of a
    pass belongs inside the context, before the next pass: activation checkpointing chooses again there. Raises
    ValueError if shapes do not fit, an id names no expert, or there are more passes than records.
    """
    blocks = expert_blocks(model)
    queue, current = iter(recorded), {}
    num_layers, num_experts = shape(blocks)
    top_k = next(iter(blocks.values())).gate.top_k

    def begin(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        embeds = kwargs["inputs_embeds"]
        wanted = (num_layers, embeds.shape[0] * embeds.shape[1], top_k)
        given = next(queue, None)
        if given is None:
            raise ValueError(f"{len(recorded)} forward passes were recorded, and this is one more")
        if tuple(given.shape) != wanted:
            raise ValueError(
                f"recorded choices are {tuple(given.shape)}, this pass needs {wanted}: layers, tokens, experts"
            )
        if given.numel() and int(given.max()) >= num_experts:
            raise ValueError(f"recorded choices name expert {int(given.max())} of {num_experts}")
        current["ids"] = given.to(embeds.device).long()

    def force(row: int) -> Any:
        def hook(gate: nn.Module, _: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            logits, _, live = output
            ids = current["ids"][row].to(live.device)
            ids = torch.where((ids < 0).any(dim=-1, keepdim=True), live, ids)
            return logits, _weights(gate, _scores(logits), ids).to(logits.dtype), ids

        return hook

    handles = [_lm(model).register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [block.gate.register_forward_hook(force(row)) for row, block in enumerate(blocks.values())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scores(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(dim=-1, dtype=torch.float)


def _weights(gate: nn.Module, scores_NE: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """The scores of the chosen experts, as the router itself weighs them."""
    weights = scores_NE.gather(-1, ids_NK)
    return weights / weights.sum(dim=-1, keepdim=True) if gate.norm_topk_prob else weights


# ---- the bias -------------------------------------------------------------------------------------------------------


def set_bias(model: nn.Module, bias: torch.Tensor | Sequence[Sequence[float]] | None) -> None:
    """Add ``bias`` [L, E] to the scores by which the L sparse layers choose experts; None takes it away.

    It is written to the configuration, with which it is saved and loaded. Raises ValueError if it does not fit.
    """
    blocks = sparse_layers(model)
    rows = bias.tolist() if isinstance(bias, torch.Tensor) else bias
    if rows is not None:
        found, wanted = [len(row) for row in rows], [block.gate.num_experts for block in blocks.values()]
        if found != wanted:
            raise ValueError(
                f"router_bias holds {found} values by layer; the experts of this model's sparse layers number {wanted}"
            )
    for row, block in enumerate(blocks.values()):
        gate, values = block.gate, None
        if rows is not None:
            values = torch.tensor(rows[row], dtype=torch.float32)
            # While weights have no memory yet, the bias goes where the loader puts what it makes.
            values = values if gate.weight.is_meta else values.to(gate.weight.device)
            if _choose_with_bias not in gate._forward_hooks.values():
                gate.register_forward_hook(_choose_with_bias)
        gate.register_buffer(BIAS, values, persistent=False)
    model.config.router_bias = rows


def _choose_with_bias(gate: nn.Module, _: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    bias = getattr(gate, BIAS)
    if bias is None:
        return output
    scores = _scores(output[0])
    ids = (scores.detach() + bias).topk(gate.top_k, dim=-1).indices
    return output[0], _weights(gate, scores, ids).to(output[0].dtype), ids


def expert_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """``sparse_layers``, of which there must be some: ValueError for a dense model."""
    blocks = sparse_layers(model)
    if not blocks:
        raise ValueError(f"a language model of type '{model.config.text_config.model_type}' has no experts")
    return blocks


def shape(blocks: Mapping[int, nn.Module]) -> tuple[int, int]:
    """(sparse layers, experts of each)."""
    return len(blocks), next(iter(blocks.values())).gate.num_experts


def _lm(model: nn.Module) -> nn.Module:
    return getattr(model, "model", model).language_model
