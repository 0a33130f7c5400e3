"""What happens between two rows of the metrics: counted by each process for itself, put together when a row is due.

Processes exchange nothing for it in the steps between rows; a row is one exchange on the host. Only the main process
writes files. A row's ``flops`` are the model's own (closed form, recomputation left out), of all processes; ``mfu`` is
their share of what the GPUs can do (None where that is unknown: see ``hardware.py``). ``pack_use`` is how full the
packs were. ``peak_memory`` (GB) is the largest of any process so far: of tensors on a GPU, of the process on a CPU.

``straggler`` is the slowest process's seconds through their mean, waits at the start of a step left out. Within a step
sharded processes wait for each other in every block, so it shows slow data or a slow host, and not uneven packs.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from sailvl import dist, log
from sailvl.curriculum import Train
from sailvl.model.balance import entropy
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.train.flops import mfu, shape_of, step_flops
from sailvl.train.hardware import recognise
from sailvl.train.state import Counts
from sailvl.train.step import StepResult
from sailvl.types import Batch

LOCAL = ("samples", "tokens", "tiles", "rejects")
"""Counts that each process has of its own lanes; the others are the same on all processes."""


@dataclass(kw_only=True)
class _Own:
    """What one process saw since the last row."""

    local: dict[str, int]
    rejects: list[tuple[int, int, str, str]] = field(default_factory=list)
    flops: float = 0.0
    data_wait: float = 0.0
    busy: float = 0.0
    peak_memory: float = 0.0


class Meter:
    """Counts steps between rows. Metrics and rejects go to two files of ``out``, continued after ``step``."""

    def __init__(self, stage: Train, model: SailVLForConditionalGeneration, out: Path, step: int) -> None:
        self._stage, self._model = stage, model
        self._device = dist.device() if dist.world_size() > 1 else model.device
        gpu = recognise(torch.cuda.get_device_name(self._device)) if self._device.type == "cuda" else None
        self._peak = None if gpu is None else gpu.flops
        self._files: list[log.MetricsLog] = []
        if dist.is_main():
            self._files = [log.MetricsLog(out / name) for name in ("metrics.jsonl", "rejects.jsonl")]
            for file in self._files:
                file.truncate_after(step)
        self._clock = time.perf_counter()
        self._begin()

    def _begin(self) -> None:
        self.counts, self._own = Counts(), _Own(local=dict.fromkeys(LOCAL, 0))
        self._experts: torch.Tensor | None = None
        self._steps = 0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """The block ends when the step's batches are here."""
        began = time.perf_counter()
        yield
        self._own.data_wait += time.perf_counter() - began

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._clock = self._clock, time.perf_counter()
        return self._clock - before

    def add(self, step: int, batches: Sequence[Batch], counts: Counts, result: StepResult) -> None:
        """A step was done."""
        stage, own = self._stage, self._own
        rank = None if stage.lora is None else stage.lora.rank
        own.flops += step_flops(self._model.config, [shape_of(b) for b in batches], stage.trains, lora_rank=rank)
        own.busy += counts.seconds - result.waited
        own.rejects += [(step, batch.lane, reject.id, reject.reason) for batch in batches for reject in batch.rejects]
        if result.expert_counts is not None:
            self._experts = result.expert_counts + (0 if self._experts is None else self._experts)
        self.counts.add(counts)
        self._steps += 1

    def summary(self) -> str:
        """For a progress bar: loss and speed, of all processes if they are like this one."""
        return replace(self.counts, seconds=self.counts.seconds / dist.world_size()).summary()

    def row(self, values: dict[str, Any]) -> Counts:
        """Write what happened since the last row after ``values``, and begin the next. Gives the counts of all
        processes, all of which must call it."""
        own = self._own
        own.local = {name: getattr(self.counts, name) for name in LOCAL}
        own.peak_memory = _peak_memory(self._device)
        everyone = dist.gather(own)
        totals = {name: sum(each.local[name] for each in everyone) for name in LOCAL}
        counts = replace(self.counts, **totals)
        flops, busy = sum(each.flops for each in everyone), [each.busy for each in everyone]
        room = self._steps * self._stage.lanes * self._stage.max_tokens
        values = (
            values
            | counts.row()
            | {
                "pack_use": counts.tokens / room if room else None,
                "data_wait": max(each.data_wait for each in everyone),
                "flops": flops,
                "mfu": mfu(flops, counts.seconds, len(everyone), self._peak),
                "peak_memory": max(each.peak_memory for each in everyone),
                "straggler": max(busy) * len(busy) / sum(busy) if sum(busy) > 0 else None,
            }
        )
        if self._experts is not None:
            values["expert_entropy"] = float(entropy(self._experts.cpu()).mean())
        if self._files:
            metrics, rejects = self._files
            listed = [reject for each in everyone for reject in each.rejects]
            for at, _, name, reason in sorted(listed, key=lambda reject: reject[:2]):  # by step and lane
                rejects.write(step=at, id=name, reason=reason)
            metrics.write(**values)
        self._begin()
        return counts

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
