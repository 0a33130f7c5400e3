"""The processes of one run: who am I, what do all of us have together.

Every function works without a process group too (one process, nothing to exchange), so callers never ask which it is.
``processes`` joins the group that ``torchrun`` or SLURM described in the environment and leaves it in good order.

Host values travel by gloo, on CPUs, also where tensors travel by NCCL: nothing here waits for a GPU.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import distributed

T = TypeVar("T")

TIMEOUT_MINUTES = 30
"""After which a process that waits for another gives up. Long: rank 0 alone asks the probe between stages."""


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that prints, and writes what there is one of."""
    return rank() == 0


def device() -> torch.device:
    """This process's own device: its GPU by its number on the machine, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def sums(values: Sequence[float | torch.Tensor]) -> list[float]:
    """Each value (a number, or a tensor of one) summed over all processes, in fp64: the same bits everywhere. Counts
    below 2**53 are exact."""
    if world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(total)
    return total.tolist()


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` summed over all processes, in place, on its own device and without a wait for it."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def gather(value: T) -> list[T]:
    """Every process's value, in order of rank; any picklable value, between processes of one run."""
    if world_size() == 1:
        return [value]
    found: list[T | None] = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def broadcast(value: T) -> T:
    """The main process's value, for all."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def on_main(work: Callable[[], T]) -> T:
    """What ``work`` gives in the main process, for all; the others wait for it. If it raises, their wait ends in an
    error of their own when the main process ends."""
    return broadcast(work() if is_main() else cast(T, None))


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        sums([0.0])


@contextmanager
def processes() -> Iterator[None]:
    """Belong to the group that the launcher described; without one, or if a group is there already, do nothing.

    A group left while tensors still refer to it may abort the process after correct results: references are collected
    and everybody waits for everybody before it ends. After an exception nobody is waited for.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=timedelta(minutes=TIMEOUT_MINUTES))
    yield  # an exception passes through: the launcher ends the others, and a barrier here would wait for the dead
    gc.collect()
    barrier()
    distributed.destroy_process_group()
