"""Learning-rate schedules as multipliers of the peak: constant, cosine, warm-up-stable-decay, and AdaLRS on top.

The loop knows four things about a schedule: ``factor(step)``, ``observe(loss)`` after every step, ``scale`` and
``phase`` for the log. A fixed schedule always answers "go"; AdaLRS (``adalrs.py``) may ask the loop for a snapshot
of the weights or for a rollback. Steps count from 0.

Warm-up is linear and its first step already trains (1/warmup_steps, not 0); the last step of a decaying schedule
trains at exactly ``final`` times the peak. The report names cosine and WSD without formulas; WSD's decay is linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from sailvl import curriculum
from sailvl.train.adalrs import Action, AdaLRSController


class Schedule(Protocol):
    """What the training loop asks of any schedule. ``state_dict`` is JSON-able."""

    @property
    def scale(self) -> float: ...
    @property
    def phase(self) -> str: ...
    @property
    def rewind(self) -> bool: ...
    def factor(self, step: int) -> float: ...
    def observe(self, loss: float | None) -> Action: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Fixed:
    """A schedule that does not look at the loss."""

    scale: float = 1.0
    phase: str = "fixed"
    rewind: bool = False

    def __init__(self, factor: Callable[[int], float]) -> None:
        self.factor = factor

    def observe(self, loss: float | None) -> Action:
        return "go"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"a fixed schedule has no state, the checkpoint holds {sorted(state)}")


def build(value: curriculum.Schedule, steps: int) -> Schedule:
    """The schedule of a stage of ``steps`` optimizer steps. ValueError if it does not fit in them."""
    if isinstance(value, curriculum.AdaLRS):
        return AdaLRSController(
            fixed_factor(value.base, steps),
            steps=steps,
            warmup_steps=value.base.warmup_steps,
            window=curriculum.adalrs_window(value, steps),
            alpha=value.alpha,
            beta=value.beta,
            decay=value.decay,
            start=value.start,
            stop=value.stop,
            margin=value.margin,
            rewind=value.rewind,
        )
    return Fixed(fixed_factor(value, steps))


def fixed_factor(value: curriculum.Constant | curriculum.Cosine | curriculum.WSD, steps: int) -> Callable[[int], float]:
    """step -> multiplier in [0, 1]. ValueError if warm-up (and decay) are longer than the stage."""
    warmup = value.warmup_steps
    decay = value.decay_steps if isinstance(value, curriculum.WSD) else 0
    if warmup + decay > steps:
        raise ValueError(f"{warmup} warm-up and {decay} decay steps do not fit in {steps} steps: shorten them")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if isinstance(value, curriculum.Constant):
            return 1.0
        if isinstance(value, curriculum.Cosine):
            progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
            return value.final + (1 - value.final) * 0.5 * (1 + math.cos(math.pi * progress))
        into_decay = min(1.0, max(0, step - (steps - 1 - decay)) / max(1, decay))
        return 1 - (1 - value.final) * into_decay

    return factor
