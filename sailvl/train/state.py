"""Everything that changes while a stage trains, and the copy AdaLRS goes back to.

A snapshot holds what one optimizer step changes: trained weights, every optimizer tensor (moments *and* step counts:
Adam's bias correction depends on them) and the random generators. It also remembers the data cursor and the step,
used only with ``rewind``. It costs 12 bytes of host memory per trained parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sailvl.data.loader import Loader
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.train.schedule import Schedule
from sailvl.types import Batch


@dataclass(kw_only=True)
class Counts:
    """Work done. Steps that were rolled back count; ``loss_sum`` (nats) and ``supervised_tokens`` leave out the steps
    whose update was skipped."""

    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    tiles: int = 0
    supervised_tokens: int = 0
    loss_sum: float = 0.0
    rejects: int = 0
    wasted_steps: int = 0
    skipped_updates: int = 0

    @property
    def loss(self) -> float | None:
        """Mean nats per supervised token, or None if there was none."""
        return self.loss_sum / self.supervised_tokens if self.supervised_tokens else None

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def row(self) -> dict[str, float | None]:
        """The counts as they are logged: the mean loss instead of the sum."""
        return {"loss": self.loss, **{name: value for name, value in vars(self).items() if name != "loss_sum"}}

    def summary(self) -> str:
        """For a progress bar: loss and speed."""
        loss = "no loss" if self.loss is None else f"loss {self.loss:.3f}"
        return f"{loss}, {self.tiles / self.seconds:.1f} tiles/s, {self.tokens / self.seconds:,.0f} tokens/s"


def count_step(
    batches: Sequence[Batch], loss: float, grad_norm: float, supervised_tokens: int, *, seconds: float
) -> Counts:
    """What one step did; ``loss`` is the mean over its supervised tokens. Not finite means the update was skipped."""
    is_sane = math.isfinite(loss) and math.isfinite(grad_norm)
    return Counts(
        seconds=seconds,
        samples=sum(batch.num_samples for batch in batches),
        tokens=sum(len(batch.ids_T) for batch in batches),
        tiles=sum(batch.num_tiles for batch in batches),
        supervised_tokens=supervised_tokens if is_sane else 0,
        loss_sum=loss * supervised_tokens if is_sane else 0.0,
        rejects=sum(len(batch.rejects) for batch in batches),
        skipped_updates=0 if is_sane else 1,
    )


@dataclass(kw_only=True)
class Snapshot:
    """A copy on the host, taken after ``step`` steps."""

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    rng: dict[str, list[torch.Tensor]]
    loader: dict[str, Any]


@dataclass(kw_only=True)
class TrainState:
    """The live objects of a stage; ``step`` counts the steps already done."""

    model: SailVLForConditionalGeneration
    optimizer: torch.optim.AdamW
    schedule: Schedule
    loader: Loader
    precision: str
    step: int = 0
    bad_steps: int = 0
    snapshot: Snapshot | None = None
    totals: Counts = field(default_factory=Counts)


def take_snapshot(state: TrainState) -> Snapshot:
    """Copy what ``roll_back`` needs."""
    trained = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
    return Snapshot(
        step=state.step,
        weights=copied(trained),
        optimizer=copied(state.optimizer.state_dict()),
        rng=rng_state(),
        loader=state.loader.state_dict(),
    )


def roll_back(state: TrainState, *, rewind: bool) -> int:
    """Return to the snapshot and forget it; with ``rewind`` the data and the step too. Returns the steps wasted."""
    snapshot, state.snapshot = state.snapshot, None
    if snapshot is None:
        raise RuntimeError("the schedule asked for a rollback, but no snapshot was taken")
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            if name in snapshot.weights:
                parameter.copy_(snapshot.weights[name])
    state.optimizer.load_state_dict(snapshot.optimizer)
    set_rng_state(snapshot.rng)
    wasted = state.step - snapshot.step
    if rewind:
        state.loader.load_state_dict(snapshot.loader)
        state.step = snapshot.step
    return wasted


def copied(value: Any) -> Any:
    """The same nest of dicts and lists with every tensor copied to the host.

    ``copy=True`` matters: on a CPU model a plain ``.to("cpu")`` is the tensor itself, and going back does nothing.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value


def rng_state() -> dict[str, list[torch.Tensor]]:
    """State of every torch generator the model could draw from (the model has no dropout; extensions might)."""
    return {"cpu": [torch.get_rng_state()], "cuda": torch.cuda.get_rng_state_all()}


def set_rng_state(state: dict[str, list[torch.Tensor]]) -> None:
    """Put back ``rng_state``; states of GPUs that this machine lacks are left out."""
    torch.set_rng_state(state["cpu"][0])
    for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(value, device)
