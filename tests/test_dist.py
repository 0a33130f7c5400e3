"""What processes have together, on one of them and on several."""

import pytest
import torch

from sailvl import dist
from tests.train import group


def facts():
    rank = dist.rank()
    return {
        "rank": (rank, dist.world_size(), dist.is_main()),
        "sums": dist.sums([rank, 0.1, torch.tensor(2.0**53 - 8, dtype=torch.float64) / dist.world_size()]),
        "gather": dist.gather({"rank": rank}),
        "broadcast": dist.broadcast([rank, "text"]),
        "on_main": dist.on_main(lambda: f"made by {rank}"),
        "add_up": dist.add_up(torch.tensor([rank, 1])).tolist(),
        "device": dist.device().type,
    }


def test_one_process_has_what_it_gives():
    assert facts() == {
        "rank": (0, 1, True), "sums": [0.0, 0.1, 2.0**53 - 8], "gather": [{"rank": 0}], "broadcast": [0, "text"],
        "on_main": "made by 0", "add_up": [0, 1], "device": dist.device().type,
    }  # fmt: skip
    dist.barrier()
    with dist.processes():
        assert dist.world_size() == 1


def test_four_processes_have_the_same():
    found = group.together(4, facts)
    for rank, each in enumerate(found):
        assert each["rank"] == (rank, 4, rank == 0)
        assert each["gather"] == [{"rank": other} for other in range(4)]
        assert (each["broadcast"], each["on_main"], each["add_up"]) == ([0, "text"], "made by 0", [6, 4])
        assert each["sums"] == found[0]["sums"] and each["sums"][0] == 6 and each["sums"][2] == 2**53 - 8
        assert each["sums"][1] == pytest.approx(0.4)


def test_a_group_that_exists_is_used_and_left_alone():
    def nested():
        with dist.processes():
            first = dist.sums([1.0])
        return first, dist.sums([1.0])

    assert group.together(2, nested) == [([2.0], [2.0])] * 2


def test_work_of_the_main_process_is_done_once():
    def work():
        done = []
        dist.on_main(lambda: done.append(1))
        return len(done)

    assert group.together(3, work) == [1, 0, 0]


def test_processes_that_had_tensors_in_flight_end_in_good_order():
    """More than once, because what a bare ending breaks, it breaks now and then."""

    def work():
        kept = [torch.ones(1000) for _ in range(20)]
        for tensor in kept:
            dist.add_up(tensor)
        return float(kept[-1][0])

    for _ in range(3):
        assert group.together(2, work) == [2.0, 2.0]


def test_the_helper_reports_what_hangs_and_what_fails():
    def waits():
        if dist.rank() == 0:
            dist.barrier()

    def fails():
        raise ValueError("as told")

    with pytest.raises(AssertionError, match=r"hangs|closed by peer|timed out"):
        group.together(2, waits, seconds=3)
    with pytest.raises(AssertionError, match="as told"):
        group.together(1, fails)
