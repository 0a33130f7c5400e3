"""Run a function in several processes of one gloo group, with a time limit: a hang is a failure within seconds."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch

from sailvl import dist

FORK = get_context("fork")


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher would say to process ``rank`` of ``size``."""
    return {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }  # fmt: skip


def together(size: int, function: Callable[..., Any], *args: Any, seconds: float = 60.0) -> list[Any]:
    """``function(*args)`` in each of ``size`` processes; their results by rank. AssertionError if one fails or hangs.

    Processes are forked, so that nothing is imported again; what they return is pickled.
    """
    port, pipes, children = free_port(), [], []
    for rank in range(size):
        reader, writer = FORK.Pipe(duplex=False)
        child = FORK.Process(target=_child, args=(writer, environment(rank, size, port), function, args))
        child.start()
        writer.close()
        pipes.append(reader)
        children.append(child)
    results, deadline = [], time.monotonic() + seconds
    try:
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(max(0.0, deadline - time.monotonic())), f"process {rank} of {size} hangs"
            try:
                is_fine, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise AssertionError(f"process {rank} of {size} died without a word") from None
            assert is_fine, f"process {rank} of {size}:\n{value}"
            results.append(value)
        for rank, child in enumerate(children):
            child.join(max(0.1, deadline - time.monotonic()))
            assert child.exitcode == 0, f"process {rank} of {size} ended with {child.exitcode}"
    finally:
        for child in children:
            child.kill()
            child.join()
    return results


def _child(writer: Any, variables: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        with dist.processes():
            answer = (True, function(*args))
        status = 0
    except BaseException:  # noqa: BLE001 - whatever it is, the parent reports it
        answer, status = (False, traceback.format_exc()), 1
    writer.send_bytes(pickle.dumps(answer))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
