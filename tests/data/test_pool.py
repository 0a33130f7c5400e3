from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

import pytest
import torch

from sailvl.data.pool import Pool, WorkerError


def test_results_come_in_the_order_of_tasks() -> None:
    def slow_when_small(task: int) -> tuple[int, torch.Tensor]:
        time.sleep(0.002 * (10 - task % 10))
        return task, torch.full((1000,), task)

    pool = Pool(slow_when_small, 3)
    for task in range(12):
        pool.send(task)
    for task in range(12):
        number, values = pool.receive()
        assert number == task
        assert values.eq(task).all()
    pool.close()


def test_discard_drops_what_is_under_way_and_keeps_the_workers() -> None:
    pool = Pool(lambda task: (task, os.getpid()), 2)
    for task in range(5):
        pool.send(task)
    pids = {pool.receive()[1] for _ in range(2)}
    pool.discard()
    for task in range(10, 14):
        pool.send(task)
    answers = [pool.receive() for _ in range(4)]
    assert [task for task, _ in answers] == [10, 11, 12, 13]
    assert {pid for _, pid in answers} == pids
    pool.close()


class Stubborn(Exception):
    def __init__(self, a: int, b: int) -> None:  # cannot be pickled: args do not match
        super().__init__("stubborn")


def test_errors_are_raised_in_the_parent_and_the_worker_lives_on() -> None:
    def work(task: int) -> int:
        if task == 0:
            raise LookupError("task 0")
        if task == 1:
            raise Stubborn(1, 2)
        return task

    pool = Pool(work, 1)
    for task in range(3):
        pool.send(task)
    with pytest.raises(LookupError, match="task 0") as caught:
        pool.receive()
    assert "in work" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="Stubborn"):
        pool.receive()
    assert pool.receive() == 2
    pool.close()


def test_a_dead_worker_is_named_with_its_end() -> None:
    pool = Pool(lambda task: os._exit(7), 2)
    pool.send(0)
    with pytest.raises(WorkerError, match=r"data worker 0 died .exit code 7"):
        pool.receive()
    with pytest.raises(WorkerError, match="data worker 0 died"):  # still, and at once
        pool.discard()
    pool.close()


def test_workers_end_when_their_parent_is_gone() -> None:
    def parent(connection: Any) -> None:
        pool = Pool(lambda task: os.getpid(), 2)
        for task in range(2):
            pool.send(task)
        connection.send([pool.receive(), pool.receive()])
        os._exit(1)

    mine, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=parent, args=(its,))
    process.start()
    pids = mine.recv()
    process.join()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if alive(pid)] == []


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False
