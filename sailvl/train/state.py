"""Everything that changes while a stage trains, and the copy AdaLRS goes back to.

A snapshot holds what one optimizer step changes: trained weights, every optimizer tensor (moments *and* step counts:
Adam's bias correction depends on them), the average of the weights and the random generators. It also remembers the
data cursor and the step, used only with ``rewind``.

Each process copies what it holds itself (of a sharded tensor its shard), so nothing is exchanged, and always into the
same host buffers: 12 bytes per trained parameter (16 with an average) divided by the processes, allocated once, pinned
where there is a GPU (untested: no GPU was at hand).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed import ProcessGroup

from sailvl.data.loader import Loader
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.train.background import Task
from sailvl.train.ema import Ema
from sailvl.train.schedule import Schedule
from sailvl.train.shards import local, named_parameters, reshard
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
    """A copy on the host, taken after ``step`` steps, of what this process holds (its shards).

    ``optimizer`` maps "exp_avg.NAME" to a tensor, ``ema`` is (its weights, its updates) if there is an average.
    """

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    rng: dict[str, list[torch.Tensor]]
    loader: dict[str, Any]
    ema: tuple[dict[str, torch.Tensor], int] | None = None
    expert_counts: torch.Tensor | None = None


@dataclass(kw_only=True)
class TrainState:
    """The live objects of a stage; ``step`` counts the steps already done.

    ``expert_counts`` are those of the step before (int64 [L, E], of all processes). ``held_out`` is the step and the
    loss of the last validation. ``saving`` is a checkpoint being written, ``group`` where its processes talk meanwhile,
    ``host`` memory that copies use again.
    """

    model: SailVLForConditionalGeneration
    optimizer: torch.optim.AdamW
    schedule: Schedule
    loader: Loader
    precision: str
    step: int = 0
    bad_steps: int = 0
    snapshot: Snapshot | None = None
    totals: Counts = field(default_factory=Counts)
    ema: Ema | None = None
    expert_counts: torch.Tensor | None = None
    held_out: tuple[int, float] | None = None
    saving: Task | None = None
    group: ProcessGroup | None = None
    host: dict[str, torch.Tensor] = field(default_factory=dict)


def take_snapshot(state: TrainState) -> Snapshot:
    """Copy what ``roll_back`` needs, over the snapshot before."""
    if state.saving is not None:
        state.saving.wait()  # it may still be writing the buffers that are filled here
    weights = {name: p for name, p in named_parameters(state.model) if p.requires_grad}
    ema = state.ema
    return Snapshot(
        step=state.step,
        weights=copied(weights, state.host, "snapshot.weights."),
        optimizer=copied(optimizer_tensors(state), state.host, "snapshot.optimizer."),
        rng=rng_state(),
        loader=state.loader.state_dict(),
        ema=None if ema is None else (copied(ema.weights, state.host, "snapshot.ema."), ema.updates),
        expert_counts=state.expert_counts,
    )


def roll_back(state: TrainState, *, rewind: bool) -> int:
    """Return to the snapshot and forget it; with ``rewind`` the data and the step too. Returns the steps wasted."""
    snapshot, state.snapshot = state.snapshot, None
    if snapshot is None:
        raise RuntimeError("the schedule asked for a rollback, but no snapshot was taken")
    live = optimizer_tensors(state)
    with torch.no_grad():
        for name, parameter in named_parameters(state.model):
            if name in snapshot.weights:
                local(parameter).copy_(snapshot.weights[name])
        for name in live.keys() & snapshot.optimizer.keys():
            local(live[name]).copy_(snapshot.optimizer[name])
        if state.ema is not None and snapshot.ema is not None:
            copies, state.ema.updates = snapshot.ema
            for name, average in state.ema.weights.items():
                average.copy_(copies[name])
    if not snapshot.optimizer:
        state.optimizer.state.clear()  # the snapshot was taken before the first update
    state.expert_counts = snapshot.expert_counts
    reshard(state.model)
    set_rng_state(snapshot.rng)
    wasted = state.step - snapshot.step
    if rewind:
        state.loader.load_state_dict(snapshot.loader)
        state.step = snapshot.step
    return wasted


def optimizer_tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """The optimizer's tensors by "KEY.PARAMETER"; frozen parameters have none, nor has any before the first update."""
    return {
        f"{key}.{name}": value
        for name, parameter in named_parameters(state.model)
        if parameter in state.optimizer.state
        for key, value in state.optimizer.state[parameter].items()
    }


def copied(
    tensors: Mapping[str, torch.Tensor], buffers: dict[str, torch.Tensor], prefix: str
) -> dict[str, torch.Tensor]:
    """What this process holds of ``tensors``, copied to the host, into ``buffers[prefix + name]`` where that fits.

    Copies need memory of their own: on a CPU model ``.to("cpu")`` is the tensor itself, and going back does nothing.
    """
    copies = {}
    for name, tensor in tensors.items():
        source = local(tensor)
        buffer = buffers.get(prefix + name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            buffers[prefix + name] = buffer
        copies[name] = buffer.copy_(source, non_blocking=source.is_cuda)
    if any(local(tensor).is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies


def rng_state() -> dict[str, list[torch.Tensor]]:
    """State of the torch generators this process could draw from: the CPU's, and its own GPU's once that is in use
    (the model has no dropout; extensions might)."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return {"cpu": [torch.get_rng_state()], "cuda": cuda}


def set_rng_state(state: dict[str, list[torch.Tensor]]) -> None:
    """Put back ``rng_state``; a GPU's is left out where there is none."""
    torch.set_rng_state(state["cpu"][0])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
