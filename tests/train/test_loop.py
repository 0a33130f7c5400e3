"""Whole stages of a tiny model: stopped, killed and continued in every way, and what they leave on disk."""

import json
import os
import random
import signal
import threading
import time
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import sailvl.train.loop as loop
from sailvl import log
from sailvl.curriculum import AdaLRS, Constant
from sailvl.data.source import JsonlSource
from sailvl.model import checkpoint as model_checkpoint
from sailvl.train import checkpoint
from sailvl.train.loop import DivergedError, train

FORK = get_context("fork")
TIMES = ("seconds", "data_wait", "mfu", "peak_memory", "straggler")
"""What differs from run to run."""


@pytest.fixture
def run(stage, assets, processor, sources):
    """Trains a fresh copy of the model into a folder, as the same command given again would."""

    def run(out, workers=0, progress=None, sources=sources, **changes):
        model = model_checkpoint.load(assets / "model", dtype=torch.float32)
        return train(stage(**changes), model, processor, sources, out, workers=workers, progress=progress)

    return run


def final_bits(out):
    """Bytes of the final model and of everything in the last checkpoint except how long it took."""
    last = checkpoint.newest(out / "checkpoints")
    state = json.loads((last / "state.json").read_text())
    state["totals"].pop("seconds")
    files = [out / "model" / "model.safetensors", last / "model.safetensors"]
    return [file.read_bytes() for file in files], optimizer_bits(last), json.dumps(state)


def optimizer_bits(path):
    return (path / "optimizer.safetensors").read_bytes()


def rows_of(out):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in log.read(out / "metrics.jsonl")]


def in_process(function):
    """Run in a child that may be killed; returns the process."""
    process = FORK.Process(target=function)
    process.start()
    return process


def test_a_run_learns_logs_and_leaves_a_model_that_loads(run, processor, tmp_path):
    result = run(tmp_path, steps=30, lanes=1)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 31))
    first, last = (sum(row["loss"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last < first - 0.5
    assert set(rows[0]) == {
        "step", "loss", "lr", "scale", "grad_norm", "supervised_tokens", "tokens", "tiles", "samples", "rejects",
        "event", "phase", "wasted_steps", "skipped_updates", "flops", "pack_use",
    }  # fmt: skip
    assert result.steps == 30 and result.loss == rows[-1]["loss"] and result.precision == "fp32"
    for name in ("samples", "tokens", "tiles", "supervised_tokens"):
        assert getattr(result.totals, name) == sum(row[name] for row in rows) > 0
    model = AutoModelForImageTextToText.from_pretrained(result.model)
    trained = load_file(checkpoint.newest(tmp_path / "checkpoints") / "model.safetensors")
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    assert AutoProcessor.from_pretrained(result.model).tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_rows_between_the_logged_ones_are_summed_up(run, tmp_path):
    run(tmp_path / "each")
    run(tmp_path / "some", log_every=3)
    each, some = rows_of(tmp_path / "each"), rows_of(tmp_path / "some")
    assert [row["step"] for row in some] == [3, 4, 6, 8]
    assert [row["tokens"] for row in some] == [
        sum(row["tokens"] for row in each[begin:end]) for begin, end in ((0, 3), (3, 4), (4, 6), (6, 8))
    ]
    loss = sum(row["loss"] * row["supervised_tokens"] for row in each[:3]) / some[0]["supervised_tokens"]
    assert some[0]["loss"] == pytest.approx(loss)


@pytest.mark.parametrize("workers", [0, 2])
def test_four_and_four_steps_are_eight_bit_for_bit(run, tmp_path, monkeypatch, workers):
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        stop_after(monkeypatch, 4)
        run(tmp_path / "halves", workers=workers)
    monkeypatch.undo()
    assert not (tmp_path / "halves" / "model").exists()
    run(tmp_path / "halves", workers=2 - workers)
    assert final_bits(tmp_path / "whole") == final_bits(tmp_path / "halves")
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "halves")


def stop_after(monkeypatch, step, number=signal.SIGINT):
    """Send a signal to this process while ``step`` is being computed."""
    done = iter(range(1, 10**6))
    train_step = loop.train_step

    def interrupted(*args, **kwargs):
        if next(done) == step:
            os.kill(os.getpid(), number)
        return train_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", interrupted)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_finishes_the_step_saves_and_leaves(run, tmp_path, monkeypatch, number, error):
    before = signal.getsignal(number)
    stop_after(monkeypatch, 3, number)
    with pytest.raises(error) as caught:
        run(tmp_path)
    assert signal.getsignal(number) is before
    assert error is KeyboardInterrupt or caught.value.code == 143
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-000003"
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]


def test_a_second_signal_stops_at_once(run, tmp_path, monkeypatch):
    def twice(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        raise AssertionError("still running")

    monkeypatch.setattr(loop, "train_step", twice)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert checkpoint.newest(tmp_path / "checkpoints") is None


def test_training_outside_of_the_main_thread_needs_no_signals(run, tmp_path):
    thread = threading.Thread(target=run, args=(tmp_path,), kwargs={"steps": 2})
    thread.start()
    thread.join()
    assert (tmp_path / "model" / "config.json").exists()


def kill_self(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def then_kill(function, when=lambda *_: True):
    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        if when(*args):
            kill_self()
        return result

    return wrapped


def second(call, number=1):
    """Dies after the second call, or the one of that number, from 0."""
    calls = iter(range(10**6))
    return then_kill(call, when=lambda *_: next(calls) == number)


PLACES = {
    "after the weights": lambda: setattr(checkpoint, "write_shards", second(checkpoint.write_shards, 2)),
    "after the optimizer": lambda: setattr(checkpoint, "write_shards", second(checkpoint.write_shards, 3)),
    "before the marker": lambda: setattr(checkpoint, "_state_values", second(checkpoint._state_values)),
    "before the rename": lambda: setattr(
        checkpoint, "force_to_disk",
        then_kill(checkpoint.force_to_disk, when=lambda path: path.name.startswith(".unfinished-new-step-000004")),
    ),
    "before old ones go": lambda: setattr(checkpoint, "_forget_others", second(lambda *_: None)),
    "while the model is saved": lambda: setattr(model_checkpoint, "replace_folder", kill_self),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_killed_while_saving_a_run_continues_to_the_same_bits(run, tmp_path, place):
    def killed():
        PLACES[place]()
        run(tmp_path / "killed", save_every=2, steps=5)

    process = in_process(killed)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    expected = {"before old ones go": "step-000004", "while the model is saved": "step-000005"}
    assert checkpoint.newest(tmp_path / "killed" / "checkpoints").name == expected.get(place, "step-000002")
    run(tmp_path / "killed", save_every=2, steps=5)
    run(tmp_path / "whole", save_every=2, steps=5)
    assert final_bits(tmp_path / "killed") == final_bits(tmp_path / "whole")
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000005"]


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_again_and_again_at_random_moments_a_run_ends_with_the_same_bits(run, tmp_path, workers):
    run(tmp_path / "whole", steps=12, save_every=1)
    draw = random.Random(workers)
    kills = 0
    for _ in range(5):
        process = in_process(lambda: run(tmp_path / "killed", workers=workers, steps=12, save_every=1))
        process.join(timeout=draw.uniform(0.1, 0.6))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    run(tmp_path / "killed", steps=12, save_every=1)
    assert kills >= 1
    assert final_bits(tmp_path / "killed") == final_bits(tmp_path / "whole")
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


def test_another_stage_does_not_continue_these_checkpoints(run, tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(model_checkpoint.CheckpointError, match="other settings"):
        run(tmp_path, steps=2, lr=1e-4)
    run(tmp_path, steps=2, save_every=7, log_every=5)


def test_a_finished_run_called_again_only_writes_its_model_again(run, tmp_path, monkeypatch):
    first = run(tmp_path)
    before = final_bits(tmp_path)
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: pytest.fail("trained again"))
    again = run(tmp_path)
    assert final_bits(tmp_path) == before and again.loss == first.loss and again.totals == first.totals


def test_frozen_parts_keep_their_bytes_over_a_whole_stage(run, assets, tmp_path):
    result = run(tmp_path, trains=("projector",))
    before, after = (load_file(path / "model.safetensors") for path in (assets / "model", result.model))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("mlp1.") for name in changed)
    assert len(changed) == sum(name.startswith("mlp1.") for name in before)


def test_a_fresh_projector_forgets_the_old_one(run, assets, tmp_path):
    one = run(tmp_path / "one", trains=("projector",), fresh=("projector",), steps=2, lr=1e-12)
    two = run(tmp_path / "two", trains=("projector",), fresh=("projector",), steps=2, lr=1e-12, seed=1)
    weights = [load_file(p / "model.safetensors")["mlp1.1.weight"] for p in (assets / "model", one.model, two.model)]
    assert all((weights[a] - weights[b]).abs().max() > 1e-3 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_half_precision_weights_are_trained_in_fp32(stage, assets, processor, sources, tmp_path):
    model = model_checkpoint.load(assets / "model", dtype=torch.bfloat16)
    train(stage(steps=2), model, processor, sources, tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_rejected_samples_are_listed_counted_and_not_listed_twice(run, assets, tmp_path, monkeypatch):
    lines = (assets / "data.jsonl").read_text().splitlines()
    for row in (3, 4):
        sample = json.loads(lines[row])
        lines[row] = json.dumps({**sample, "messages": sample["messages"][:1]})
    path = assets / "with-bad.jsonl"
    path.write_text("\n".join(lines))
    sources = {"samples": JsonlSource(path, "samples")}
    with pytest.raises(KeyboardInterrupt):
        stop_after(monkeypatch, 5)
        run(tmp_path / "halves", sources=sources)
    monkeypatch.undo()
    halves = run(tmp_path / "halves", sources=sources)
    run(tmp_path / "whole", sources=sources)
    listed = log.read(tmp_path / "whole" / "rejects.jsonl")
    assert {row["id"] for row in listed} == {"r3", "r4"} and all("assistant" in row["reason"] for row in listed)
    assert listed == log.read(tmp_path / "halves" / "rejects.jsonl")
    assert halves.totals.rejects == len(listed) == sum(row["rejects"] for row in rows_of(tmp_path / "whole"))


def poison(monkeypatch, steps):
    """Make the loss of the given steps NaN."""
    numbers = iter(range(1, 10**6))
    train_step = loop.train_step

    def poisoned(model, batches, optimizer, **kwargs):
        if next(numbers) in steps:
            batches = [type(b)(**{**vars(b), "tiles_N3SS": b.tiles_N3SS * float("nan")}) for b in batches]
        return train_step(model, batches, optimizer, **kwargs)

    monkeypatch.setattr(loop, "train_step", poisoned)


def test_two_bad_steps_are_skipped_and_logged(run, tmp_path, monkeypatch):
    poison(monkeypatch, {3, 4})
    result = run(tmp_path)
    rows = rows_of(tmp_path)
    assert [row["event"] for row in rows] == ["go", "go", "skipped", "skipped", "go", "go", "go", "go"]
    assert rows[2]["loss"] is None and rows[2]["grad_norm"] is None and result.totals.skipped_updates == 2


def test_three_bad_steps_end_the_run_and_say_what_to_do(run, tmp_path, monkeypatch):
    poison(monkeypatch, {3, 4, 5})
    with pytest.raises(DivergedError, match=r"stage tiny.*not finite in 3 steps up to step 5.*lower lr"):
        run(tmp_path)
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-000004"


def test_progress_is_shown(run, tmp_path):
    from rich.progress import Progress

    with Progress(disable=True) as progress:
        run(tmp_path, progress=progress)
        (task,) = progress.tasks
        assert task.finished and "tiny" in task.description and "tokens/s" in task.description


# ---- AdaLRS on a real model ---------------------------------------------------------------------------------------

SEARCH = {
    "steps": 30,
    "lanes": 1,
    "lr": 1e-3,
    "schedule": AdaLRS(base=Constant(warmup_steps=1), window=3, alpha=1e5, start=0.1, stop=0.9),
}
"""A trial raises the learning rate to 100, at which the loss explodes."""


def test_a_failed_trial_goes_back_and_costs_its_steps(run, tmp_path):
    result = run(tmp_path, **SEARCH)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 31)), "the data and the steps run on"
    begin = next(i for i, row in enumerate(rows) if row["event"] == "snapshot")
    end = next(i for i, row in enumerate(rows) if row["event"] == "rollback")
    assert all(row["phase"] == "trial" and row["scale"] == 1e5 for row in rows[begin + 1 : end + 1])
    assert rows[end]["loss"] > rows[0]["loss"] > rows[end + 1]["loss"], "exploded, and back to before the trial"
    assert rows[end + 1]["scale"] == 0.5
    assert rows[end]["wasted_steps"] == end - begin
    assert result.totals.wasted_steps == sum(row["wasted_steps"] for row in rows)


def test_killed_inside_a_trial_a_run_rolls_back_to_the_saved_snapshot(run, tmp_path):
    def killed():
        checkpoint._forget_others = kill_in_trial
        run(tmp_path / "killed", save_every=1, **SEARCH)

    run(tmp_path / "whole", save_every=1, **SEARCH)
    step_in_trial = next(row["step"] for row in rows_of(tmp_path / "whole") if row["phase"] == "trial")

    def kill_in_trial(folder, step, *_):
        if step == step_in_trial:
            kill_self()

    process = in_process(killed)
    process.join()
    last = checkpoint.newest(tmp_path / "killed" / "checkpoints")
    assert (last / "snapshot.safetensors").exists() and last.name == f"step-{step_in_trial:06d}"
    run(tmp_path / "killed", save_every=1, **SEARCH)
    assert final_bits(tmp_path / "killed") == final_bits(tmp_path / "whole")
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


def test_a_diverging_trial_is_not_a_diverged_run(run, tmp_path, monkeypatch):
    run(tmp_path / "probe", **SEARCH)
    trial = next(row["step"] for row in rows_of(tmp_path / "probe") if row["event"] == "snapshot") + 1
    poison(monkeypatch, {trial})
    result = run(tmp_path / "run", **SEARCH)
    row = rows_of(tmp_path / "run")[trial - 1]
    assert (row["event"], row["wasted_steps"], row["skipped_updates"]) == ("rollback", 1, 1)
    assert result.steps == 30


def test_rewinding_repeats_the_steps_of_the_trial(run, tmp_path):
    run(tmp_path, **{**SEARCH, "schedule": replace(SEARCH["schedule"], rewind=True)})
    steps = [row["step"] for row in rows_of(tmp_path)]
    rollback = next(i for i, row in enumerate(rows_of(tmp_path)) if row["event"] == "rollback")
    wasted = rows_of(tmp_path)[rollback]["wasted_steps"]
    assert steps[rollback + 1] == steps[rollback] - wasted + 1 and steps[-1] == 30
