"""Worker processes that hold nothing: tasks in, results out, in the order of the tasks.

Own, and not torch's DataLoader, for three reasons: a worker that dies shows in ``receive`` and nowhere else (torch
raises from a signal handler, in the middle of whatever the program does, perhaps writing a checkpoint); a rewind just
drops what is under way and keeps the workers; and tasks go out as they are planned, so the planner stays in one place.

Tasks are dealt to workers in turn and every worker answers in order, so the next result is always the next one of a
known worker: no sorting, no queue, no thread. Results travel through a pipe, tensors in them through shared memory. A
worker never waits for the parent to read, as a message is a few kilobytes, so sending a task cannot deadlock.
"""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

_ORPHAN_CHECK_SECONDS = 2.0


class WorkerError(RuntimeError):
    """A worker process died; the message says how, and the usual causes."""


def _serve(work: Callable[[Any], Any], connection: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever handler the parent had, close() must work
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of this process alone: one worker is one thread
    while True:
        while not connection.poll(_ORPHAN_CHECK_SECONDS):
            if os.getppid() != parent:  # killed; other children of it may hold the pipe open
                return
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            message = (True, work(task))
        except Exception as error:  # noqa: BLE001  (it is raised again, in the parent)
            error.add_note("In a data worker:\n" + traceback.format_exc())
            message = (False, _portable(error))
        connection.send(message)


def _portable(error: Exception) -> Exception:
    """The error, if it survives the pipe, else its text."""
    try:
        pickle.loads(ForkingPickler.dumps(error))
        return error
    except Exception:  # noqa: BLE001  (anything may go wrong in a foreign class's pickling)
        return RuntimeError("\n".join([repr(error), *error.__notes__]))


class Pool:
    """``workers`` forked processes that call ``work``; it and what it holds need no pickling."""

    def __init__(self, work: Callable[[Any], Any], workers: int) -> None:
        context = multiprocessing.get_context("fork")
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._num_sent = self._num_received = 0
        for number in range(workers):
            mine, its = context.Pipe()
            process = context.Process(
                target=_serve, args=(work, its, os.getpid()), daemon=True, name=f"sailvl-data-{number}"
            )
            process.start()
            its.close()  # else its death would not close the pipe
            self._connections.append(mine)
            self._processes.append(process)

    def send(self, task: Any) -> None:
        """Hand a task to the next worker. Raises WorkerError if it is dead."""
        number = self._num_sent % len(self._processes)
        try:
            self._connections[number].send(task)
        except OSError as error:
            raise self._death(number, error) from error
        self._num_sent += 1

    def receive(self) -> Any:
        """The result of the oldest task without one. Raises what the work raised, or WorkerError."""
        number = self._num_received % len(self._processes)
        try:
            good, value = self._connections[number].recv()
        except (EOFError, OSError) as error:  # also if it died between sending a tensor and our taking it
            raise self._death(number, error) from error
        self._num_received += 1
        if not good:
            raise value
        return value

    def discard(self) -> None:
        """Drop the results of all tasks sent. Waits for them; the workers live on. Raises WorkerError."""
        while self._num_received < self._num_sent:
            number = self._num_received % len(self._processes)
            try:
                self._connections[number].recv()
            except (EOFError, OSError) as error:
                raise self._death(number, error) from error
            self._num_received += 1

    def _death(self, number: int, error: Exception) -> Exception:
        process = self._processes[number]
        process.join(timeout=1)
        if process.exitcode is None:
            return error
        how = f"exit code {process.exitcode}"
        if process.exitcode < 0:
            how = f"killed by signal {-process.exitcode}, {signal.Signals(-process.exitcode).name}"
        return WorkerError(
            f"data worker {number} died ({how}). Usual causes: out of memory, or too small a /dev/shm (SIGBUS): use "
            "fewer workers or give more of either. Continue from the last checkpoint."
        )

    def close(self) -> None:
        """End the workers; what is under way is lost."""
        for connection, process in zip(self._connections, self._processes, strict=True):
            connection.close()
            process.terminate()
        for process in self._processes:
            process.join()
