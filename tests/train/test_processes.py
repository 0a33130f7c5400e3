"""Whole stages of a tiny model by several processes: like one, on another number of them, stopped, and broken."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import sailvl.train.loop as loop
from sailvl import dist, log
from sailvl.config import ConfigError
from sailvl.curriculum import AdaLRS, Constant, Lora, Parallel, Validation
from sailvl.data.source import JsonlSource
from sailvl.model import checkpoint as models
from sailvl.train import checkpoint
from sailvl.train.loop import train
from sailvl.types import Mixture

TIMES = ("seconds", "data_wait", "mfu", "peak_memory", "straggler")
VALIDATION = Validation(data=Mixture(shares={"samples": 1.0}), every=2, packs=3)


@pytest.fixture
def run(stage, assets, processor, sources):
    """Trains a fresh fp64 copy of the model into a folder; to be called by every process of a group."""

    def run(out, sources=sources, **changes):
        model = models.load(assets / "model", dtype=torch.float64)
        changes = {"lanes": 4, "steps": 6, "save_every": 2, **changes}
        return train(stage(**changes), model, processor, sources, out)

    return run


def assert_same(one, other, atol=1e-12):
    """Equal rows (but for how long they took) and equal final weights."""
    rows, others = (log.read(folder / "metrics.jsonl") for folder in (one, other))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, theirs in zip(rows, others, strict=True):
        assert row.keys() == theirs.keys()
        for key in row.keys() - set(TIMES):
            assert row[key] == (pytest.approx(theirs[key], abs=1e-11) if isinstance(row[key], float) else theirs[key])
    weights, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert weights.keys() == theirs.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], theirs[name], rtol=0, atol=atol)


def stop_at(step, who=0, number=signal.SIGTERM):
    """Let process ``who`` get a signal while ``step`` is computed, and let the loop end there as if it had returned."""
    done, train_step = iter(range(1, 10**6)), loop.train_step

    def interrupted(*args, **kwargs):
        if next(done) == step and dist.rank() == who:
            os.kill(os.getpid(), number)
        return train_step(*args, **kwargs)

    loop.train_step = interrupted


def stopped(run, out, step, **changes):
    stop_at(step)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        run(out, **changes)
    return checkpoint.newest(out / "checkpoints").name


def test_a_stage_of_two_processes_is_that_of_one(run, tmp_path, group):
    """With held-out loss, an average of the weights, and checkpoints written beside training."""
    own = {"validation": VALIDATION, "keep_best": 1, "ema": 0.9, "log_every": 3}
    one = run(tmp_path / "one", **own)
    own["parallel"] = Parallel(checkpointing="full", save_async=True)
    for two in group.together(2, lambda: run(tmp_path / "two", **own)):
        assert (two.steps, two.model, two.average) == (6, tmp_path / "two" / "model", tmp_path / "two" / "ema")
        assert two.loss == pytest.approx(one.loss, abs=1e-12)
        assert replace(two.totals, seconds=0, loss_sum=0) == replace(one.totals, seconds=0, loss_sum=0)
    assert_same(tmp_path / "one", tmp_path / "two")
    averages = [load_file(tmp_path / name / "ema" / "model.safetensors") for name in ("one", "two")]
    assert all((averages[0][name] - averages[1][name]).abs().max() < 1e-12 for name in averages[0])
    assert [row["held_out_loss"] for row in log.read(tmp_path / "two" / "metrics.jsonl") if "held_out_loss" in row]


def test_adapters_learned_by_two_processes_are_merged_like_those_of_one(run, tmp_path, group):
    pytest.importorskip("peft")
    own = {"lora": Lora(rank=3, alpha=6), "trains": ("projector", "lm"), "steps": 2, "precision": "fp32"}
    run(tmp_path / "one", **own)
    found = group.together(2, lambda: run(tmp_path / "two", **own))
    assert {result.adapter for result in found} == {tmp_path / "two" / "adapter"}
    assert_same(tmp_path / "one", tmp_path / "two")
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all((adapters[0][name] - adapters[1][name]).abs().max() < 1e-12 for name in adapters[0])


def test_saved_by_two_it_goes_on_by_one_and_four_and_back(run, tmp_path, group):
    run(tmp_path / "whole")
    for name, sizes in (("one", (2, 1, 2)), ("four", (1, 4))):
        out = tmp_path / name
        for size, step in zip(sizes[:-1], (2, 1), strict=False):
            group.together(size, stopped, run, out, step)
        group.together(sizes[-1], run, out)
        assert_same(tmp_path / "whole", out)


def test_a_signal_to_one_process_stops_all_after_the_same_step(run, tmp_path, group):
    def signalled():
        stop_at(3, who=1)
        try:
            run(tmp_path)
        except (SystemExit, KeyboardInterrupt) as error:
            return type(error).__name__, checkpoint.newest(tmp_path / "checkpoints").name

    found = group.together(2, signalled)
    assert [ended for ended, _ in found] == ["KeyboardInterrupt", "SystemExit"]
    assert {name for _, name in found} == {"step-000004"}, "asked during step 3, told to all before step 4"
    group.together(2, run, tmp_path)
    run(tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path)


SEARCH = {
    "steps": 14, "lanes": 2, "lr": 1e-3, "save_every": 100,
    "schedule": AdaLRS(base=Constant(warmup_steps=1), window=3, alpha=1e5, start=0.1, stop=0.96),
}  # fmt: skip


@pytest.mark.parametrize("rewind", [False, True])
def test_the_search_for_a_learning_rate_decides_and_goes_back_alike(run, tmp_path, group, rewind):
    own = {**SEARCH, "schedule": replace(SEARCH["schedule"], rewind=rewind)}
    run(tmp_path / "one", **own)
    rows = log.read(tmp_path / "one" / "metrics.jsonl")
    assert {"snapshot", "rollback"} <= {row["event"] for row in rows}

    def searched():
        decided, observe = [], loop.observe

        def noted(state, counts):
            decided.append((observe(state, counts), state.step, state.schedule.scale))
            return decided[-1]

        loop.observe = lambda state, counts: noted(state, counts)[0]
        run(tmp_path / "two", **own)
        return decided

    found = group.together(2, searched)
    assert found[0] == found[1] and [event for event, _, _ in found[0]] == [row["event"] for row in rows]
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    # A trial raises the learning rate to 100; what it computes there is forgotten, what follows is not.
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-9 for name in weights[0])


def test_processes_that_decided_differently_do_not_go_on(run, tmp_path, group):
    def astray():
        if dist.rank() == 1:
            loop.fingerprint = lambda state: 12345
        with pytest.raises(loop.DivergedError, match="processes differ"):
            run(tmp_path)

    group.together(2, astray)


def test_rejects_of_all_processes_are_listed(run, assets, tmp_path, group):
    lines = (assets / "data.jsonl").read_text().splitlines()
    for row in range(0, 40, 3):
        sample = json.loads(lines[row])
        lines[row] = json.dumps({**sample, "messages": sample["messages"][:1]})
    path = assets / "every-third-bad.jsonl"
    path.write_text("\n".join(lines))
    sources = {"samples": JsonlSource(path, "samples")}
    run(tmp_path / "one", sources=sources)
    (two, _) = group.together(2, lambda: run(tmp_path / "two", sources=sources))
    one, other = (log.read(tmp_path / name / "rejects.jsonl") for name in ("one", "two"))
    assert one == other and len(one) == two.totals.rejects > 5


def test_an_error_in_one_process_ends_all_soon(run, tmp_path, group):
    def broken():
        if dist.rank() == 1:
            loop.train_step = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a broken process"))
        run(tmp_path)

    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)process [01] of 2.*(a broken process|closed by peer|reset by peer)"):
        group.together(2, broken, seconds=40)
    assert time.monotonic() - began < 30


def test_lanes_that_do_not_divide_are_refused_by_all(run, tmp_path, group):
    def refused():
        with pytest.raises(ConfigError, match="3 lanes cannot be dealt evenly to 2 processes"):
            run(tmp_path, lanes=3)

    group.together(2, refused)
