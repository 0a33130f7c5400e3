import itertools
import json
import os
import resource
import shutil
import signal
import threading
import warnings
from multiprocessing import get_context

import pytest
import torch
from safetensors import safe_open

from sailvl import dist
from sailvl.model.checkpoint import CheckpointError
from sailvl.train import checkpoint
from sailvl.train.folders import TEMPORARY, atomic_folder
from sailvl.train.loop import set_up
from sailvl.train.state import roll_back, take_snapshot
from sailvl.train.step import train_step


@pytest.fixture
def state(stage, model, processor, sources):
    made = set_up(stage(), model, processor, sources, workers=0)
    advance(made)
    return made


def advance(state, steps=1):
    for _ in range(steps):
        train_step(state.model, next(state.loader), state.optimizer, max_grad_norm=1.0, precision="fp32")
        state.step += 1


def bits(state):
    """Everything a resumed run depends on, by value."""
    optimizer = [{key: value.clone() for key, value in s.items()} for s in state.optimizer.state.values()]
    weights = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    return weights, optimizer, json.dumps(state.loader.state_dict()), torch.get_rng_state()


def same(ours, theirs):
    return (
        all(torch.equal(ours[0][name], theirs[0][name]) for name in ours[0])
        and all(torch.equal(a[key], b[key]) for a, b in zip(ours[1], theirs[1], strict=True) for key in a)
        and ours[2] == theirs[2]
        and torch.equal(ours[3], theirs[3])
    )


def test_a_checkpoint_brings_everything_back(state, stage, processor, sources, assets, tmp_path):
    from sailvl.model.checkpoint import load

    state.totals.samples = 77
    torch.rand(3)
    path = checkpoint.save(state, tmp_path, identity="x")
    before = bits(state)
    torch.rand(3)
    other = set_up(stage(seed=0), load(assets / "model", dtype=torch.float32), processor, sources, workers=0)
    assert not same(before, (bits(other)[0], before[1], *bits(other)[2:]))
    checkpoint.load(other, path, identity="x")
    assert same(before, bits(other)) and (other.step, other.totals.samples) == (1, 77)
    torch.set_rng_state(before[3])
    advance(state, 2)
    torch.set_rng_state(before[3])
    advance(other, 2)
    assert same(bits(state), bits(other))


def test_a_snapshot_travels_with_the_checkpoint(state, stage, model, processor, sources, tmp_path):
    state.snapshot = take_snapshot(state)
    kept = {name: value.clone() for name, value in state.snapshot.weights.items()}
    advance(state)
    path = checkpoint.save(state, tmp_path, identity="x")
    other = set_up(stage(), model, processor, sources, workers=0)
    checkpoint.load(other, path, identity="x")
    assert other.snapshot is not None and other.snapshot.step == 1
    assert all(torch.equal(other.snapshot.weights[name], kept[name]) for name in kept)
    assert other.snapshot.loader == state.snapshot.loader
    state.snapshot = None
    assert not (checkpoint.save(state, tmp_path, identity="x") / "snapshot.safetensors").exists()


def test_the_two_newest_are_kept(state, tmp_path):
    for step in (3, 20, 100, 1_000_000):
        state.step = step
        checkpoint.save(state, tmp_path, identity="x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000100", "step-1000000"]
    assert checkpoint.newest(tmp_path).name == "step-1000000"


def test_none_where_there_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "nowhere") is None


def cut_weights(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path):
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "optimizer.safetensors").write_bytes(data)


def tear_marker(path):
    (path / "DONE").write_text((path / "DONE").read_text()[:-9])


@pytest.mark.parametrize(
    "harm",
    [
        cut_weights, flip_a_bit, tear_marker, lambda path: (path / "DONE").unlink(),
        lambda path: (path / "state.json").unlink(),
    ],
)  # fmt: skip
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(state, tmp_path, harm):
    good = checkpoint.save(state, tmp_path, identity="x")
    state.step = 2
    bad = checkpoint.save(state, tmp_path, identity="x")
    harm(bad)
    with pytest.warns(UserWarning, match="step-000002 is passed over"):
        assert checkpoint.newest(tmp_path) == good
    checkpoint.save(state, tmp_path, identity="x")
    assert checkpoint.newest(tmp_path) == bad, "the damaged folder was replaced"


def test_damaged_later_checkpoints_go_once_training_went_on(state, tmp_path):
    checkpoint.save(state, tmp_path, identity="x")
    state.step = 9
    cut_weights(checkpoint.save(state, tmp_path, identity="x"))
    state.step = 2
    checkpoint.save(state, tmp_path, identity="x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_foreign_checkpoints_are_refused(state, stage, processor, sources, tiny_config, tmp_path):
    from sailvl.model.checkpoint import build

    path = checkpoint.save(state, tmp_path, identity="x")
    with pytest.raises(CheckpointError, match="other settings"):
        checkpoint.load(state, path, identity="y")
    untied = tiny_config()
    untied.text_config.tie_word_embeddings = False
    untied.tie_word_embeddings = False
    other = set_up(stage(), build(untied, seed=0), processor, sources, workers=0)
    with pytest.raises(CheckpointError, match=r"another model.*lm_head\.weight"):
        checkpoint.load(other, path, identity="x")


class Trap:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_checkpoint_cannot_run_code(state, tmp_path, capsys):
    path = checkpoint.save(state, tmp_path, identity="x")
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ""}
    torch.save({"state": Trap()}, path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors cannot be read"):
        checkpoint.load(state, path, identity="x")
    assert "code ran" not in capsys.readouterr().out


def test_an_earlier_format_is_refused_with_what_to_do(state, tmp_path):
    path = checkpoint.save(state, tmp_path, identity="x")
    values = json.loads((path / "state.json").read_text())
    del values["format"]
    (path / "state.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"earlier format \(optimizer\.pt\).*begin the stage anew"):
        checkpoint.load(state, path, identity="x")


def test_frozen_parameters_and_a_stage_before_its_first_step(stage, model, processor, sources, tmp_path):
    made = set_up(stage(trains=("projector",)), model, processor, sources, workers=0)
    path = checkpoint.save(made, tmp_path, identity="x")
    checkpoint.load(made, path, identity="x")
    assert not made.optimizer.state
    advance(made)
    path = checkpoint.save(made, tmp_path, identity="x")
    with safe_open(path / "optimizer.safetensors", "pt") as file:
        assert file.keys() and all("projector" in name for name in file.keys())
    before = bits(made)
    checkpoint.load(made, path, identity="x")
    assert same(before, bits(made))


def test_counts_of_experts_and_bad_steps_come_back(state, tmp_path):
    state.expert_counts, state.bad_steps = torch.arange(6).reshape(2, 3), 2
    path = checkpoint.save(state, tmp_path, identity="x")
    state.expert_counts, state.bad_steps = None, 0
    checkpoint.load(state, path, identity="x")
    assert torch.equal(state.expert_counts, torch.arange(6).reshape(2, 3)) and state.bad_steps == 2


def steps_in(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_the_best_are_kept_beside_the_newest_also_after_a_resume(state, tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: 2.5, 7: 2.75}
    for step, loss in losses.items():
        state.step, state.held_out = step, (step, loss) if loss is not None else (step - 1, 0.1)
        checkpoint.save(state, tmp_path, identity="x", keep_last=2, best=2)
        checkpoint.load(state, checkpoint.newest(tmp_path), identity="x")
    assert steps_in(tmp_path) == [2, 4, 6, 7], "an old loss, or none, or NaN is not the best"
    assert state.held_out == (7, 2.75)
    state.step = 8
    checkpoint.save(state, tmp_path, identity="x", keep_last=0)
    assert steps_in(tmp_path) == [8], "the newest is never deleted"


# ---- in the background ------------------------------------------------------------------------------------------


def held(monkeypatch):
    """Writing waits for the event that this returns."""
    go, write = threading.Event(), checkpoint.write_shards
    monkeypatch.setattr(checkpoint, "write_shards", lambda *args: go.wait(20) and write(*args))
    return go


def test_written_in_the_background_it_is_the_state_of_the_call(state, tmp_path, monkeypatch):
    state.snapshot = take_snapshot(state)
    at_once = checkpoint.save(state, tmp_path / "sync", identity="x")
    go = held(monkeypatch)
    later = checkpoint.save(state, tmp_path / "async", identity="x", asynchronous=True)
    state.snapshot = None
    advance(state, 2)
    assert state.saving.is_running and not later.exists()
    go.set()
    checkpoint.finish(state)
    assert later.exists() and (at_once / "DONE").read_text() == (later / "DONE").read_text()


def test_one_checkpoint_is_in_flight_and_buffers_are_used_again(state, tmp_path):
    for _ in range(3):
        checkpoint.save(state, tmp_path, identity="x", asynchronous=True)
        places = {name: buffer.data_ptr() for name, buffer in state.host.items()}
        advance(state)
    checkpoint.save(state, tmp_path, identity="x", asynchronous=True)
    assert (tmp_path / "step-000003").is_dir() and places, "the third was waited for"
    assert {name: buffer.data_ptr() for name, buffer in state.host.items()} == places
    checkpoint.finish(state)
    assert steps_in(tmp_path) == [3, 4] and state.saving is None


def test_a_new_snapshot_does_not_spoil_the_one_being_written(state, tmp_path, monkeypatch):
    state.snapshot = take_snapshot(state)
    whole = checkpoint.save(state, tmp_path / "sync", identity="x")
    go = held(monkeypatch)
    path = checkpoint.save(state, tmp_path / "async", identity="x", asynchronous=True)
    advance(state)
    threading.Timer(0.2, go.set).start()
    state.snapshot = take_snapshot(state)
    checkpoint.finish(state)
    name = "snapshot.safetensors"
    assert (path / name).read_bytes() == (whole / name).read_bytes()


def test_an_error_in_the_background_is_raised_by_the_next_save_and_the_end(state, tmp_path, monkeypatch):
    older = checkpoint.save(state, tmp_path, identity="x")
    write = checkpoint.write_shards

    def full(*_):
        raise OSError("disk full")

    for ask in (lambda: checkpoint.finish(state), lambda: checkpoint.save(state, tmp_path, identity="x")):
        state.step += 1
        monkeypatch.setattr(checkpoint, "write_shards", full)
        checkpoint.save(state, tmp_path, identity="x", asynchronous=True)
        state.saving.wait()
        monkeypatch.setattr(checkpoint, "write_shards", write)
        with pytest.raises(CheckpointError, match=r"disk full.*Earlier checkpoints are intact"):
            ask()
        assert checkpoint.newest(tmp_path) == older
        assert [path.name for path in tmp_path.iterdir()] == [older.name]
    checkpoint.save(state, tmp_path, identity="x", asynchronous=True)
    checkpoint.finish(state)
    assert steps_in(tmp_path) == [1, 3]


def test_killed_while_writing_in_the_background_the_one_before_is_used(state, tmp_path):
    older = checkpoint.save(state, tmp_path, identity="x")

    def killed():
        write = checkpoint.write_shards
        checkpoint.write_shards = lambda *args: (write(*args), os.kill(os.getpid(), signal.SIGKILL))
        state.step = 2
        checkpoint.save(state, tmp_path, identity="x", asynchronous=True)
        checkpoint.finish(state)

    process = get_context("fork").Process(target=killed)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint.newest(tmp_path) == older and len(list(tmp_path.iterdir())) == 2
    state.step = 3
    checkpoint.save(state, tmp_path, identity="x")
    assert steps_in(tmp_path) == [1, 3]


# ---- several processes ------------------------------------------------------------------------------------------


@pytest.fixture
def make(states, assets, stage, processor, sources):
    """Makes a state in the processes of a group, sharded; keyword arguments replace fields of the stage."""

    def made(replicas=1, **changes):
        settings = stage(**{"lanes": 4, "ema": 0.9, "trains": ("projector", "lm"), **changes})
        return states.make(assets, settings, processor, sources, replicas=replicas)

    return made


def lanes_next(state):
    """What the data stream gives next, of all processes' lanes."""
    own = {batch.lane: batch.ids_T.tolist() for batch in next(state.loader)}
    return {lane: ids for each in dist.gather(own) for lane, ids in each.items()}


def everything(states, state):
    """Digests of all tensors now and after going back to the snapshot, both data positions, step, counts."""
    position = json.dumps(checkpoint._with_all_lanes(dist.gather(state.loader.state_dict())))
    now = states.digests(state)
    stream = lanes_next(state)
    counts, step = state.expert_counts.tolist(), state.step
    roll_back(state, rewind=True)
    return now, position, stream, counts, step, states.digests(state), lanes_next(state), state.step


def written_by(states, make, folder, replicas=1):
    state = make(replicas)
    torch.manual_seed(100 + dist.rank())
    states.move(state, 2)
    next(state.loader)
    state.expert_counts = torch.arange(6).reshape(2, 3)
    state.snapshot = take_snapshot(state)
    states.move(state)
    next(state.loader)
    state.expert_counts = state.expert_counts + 1
    checkpoint.save(state, folder, identity="x")
    return torch.rand(1).item(), everything(states, state)


def read_by(states, make, folder, again, replicas=1):
    state = make(replicas)
    found = checkpoint.newest(folder)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        checkpoint.load(state, found, identity="x")
    number = torch.rand(1).item()
    torch.manual_seed(100 + dist.rank())
    checkpoint.save(state, again, identity="x")
    told = [str(each.message) for each in warned if "random generators" in str(each.message)]
    return number, everything(states, state), told


@pytest.mark.parametrize("sizes", [(2, 1, 2, 4), pytest.param((1, 4, 2, 1), marks=pytest.mark.slow)], ids=str)
def test_any_number_of_processes_continues_from_any_other_bit_for_bit(group, states, make, tmp_path, sizes):
    """Weights, frozen ones too, optimizer, average, snapshot with all of these, positions of all lanes, in fp64."""
    first = group.together(sizes[0], written_by, states, make, tmp_path / "0")
    numbers, expected = [number for number, _ in first], first[0][1]
    assert expected[0] != expected[5], "the snapshot is another state"
    for turn, (before, size) in enumerate(itertools.pairwise(sizes)):
        results = group.together(size, read_by, states, make, tmp_path / str(turn), tmp_path / str(turn + 1))
        for rank, (number, found, told) in enumerate(results):
            assert found == expected
            assert number == numbers[rank if rank < before else 0], "the generators of a new process are the first's"
            assert bool(told) == (rank == 0 and size > before)
        numbers = [torch.Generator().manual_seed(100 + rank) for rank in range(size)]
        numbers = [torch.rand(1, generator=generator).item() for generator in numbers]


@pytest.mark.slow
def test_of_replicas_one_writes(group, states, make, tmp_path):
    plain = group.together(2, written_by, states, make, tmp_path / "plain")
    twice = group.together(4, written_by, states, make, tmp_path / "twice", 2)
    assert twice[0][1] == plain[0][1]
    size = [sum(file.stat().st_size for file in (tmp_path / name).rglob("model-*")) for name in ("plain", "twice")]
    assert size[1] < 1.2 * size[0]
    assert group.together(1, read_by, states, make, tmp_path / "twice", tmp_path / "x")[0][1] == plain[0][1]


def in_the_background(states, make, folder):
    state = make()
    states.move(state)
    state.snapshot = take_snapshot(state)
    states.move(state)
    at_once = checkpoint.save(state, folder / "sync", identity="x")
    later = checkpoint.save(state, folder / "async", identity="x", asynchronous=True)
    for _ in range(20):  # the group of training is busy meanwhile
        dist.sums([1.0])
        states.move(state)
    checkpoint.finish(state)
    return (at_once / "DONE").read_text() == (later / "DONE").read_text()


def test_the_background_of_several_processes_writes_the_same(group, states, make, tmp_path):
    assert group.together(2, in_the_background, states, make, tmp_path) == [True, True]


def failing(states, make, folder, asynchronous):
    state = make()
    states.move(state)
    older = checkpoint.save(state, folder, identity="x")
    states.move(state)
    if dist.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    try:
        checkpoint.save(state, folder, identity="x", asynchronous=asynchronous)
        checkpoint.finish(state)
    except CheckpointError as error:
        return str(error), checkpoint.newest(folder) == older, steps_in(folder)
    return None


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])
def test_when_one_process_cannot_write_all_say_so_and_nothing_is_left(group, states, make, tmp_path, asynchronous):
    for message, is_older, kept in group.together(2, failing, states, make, tmp_path, asynchronous):
        assert "process 1: " in message and "process 0" not in message and "step-000002" in message
        assert is_older and kept == [1]


def dying(states, make, folder):
    state = make()
    states.move(state)
    checkpoint.save(state, folder, identity="x")
    states.move(state)
    if dist.rank() == 1:
        checkpoint.write_shards = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save(state, folder, identity="x")


def test_a_process_that_dies_while_saving_leaves_the_older_checkpoints(group, states, make, tmp_path):
    with pytest.raises(AssertionError, match=r"died without a word|Connection closed|process 0 of 2"):
        group.together(2, dying, states, make, tmp_path)
    assert checkpoint.newest(tmp_path).name == "step-000001"


def agreeing(folder):
    return checkpoint.newest(folder).name


def test_all_processes_agree_on_the_newest_whole_one(group, states, make, tmp_path):
    """Each looks at half of the files; what one finds counts for both."""
    group.together(2, written_by, states, make, tmp_path)
    for number, name in enumerate(sorted(file.name for file in (tmp_path / "step-000003").iterdir()), start=10):
        bad = tmp_path / f"step-{number:06d}"
        shutil.copytree(tmp_path / "step-000003", bad)
        data = bytearray((bad / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bad / name).write_bytes(data)
    assert group.together(2, agreeing, tmp_path) == ["step-000003"] * 2
    with pytest.warns(UserWarning, match="passed over"):
        assert checkpoint.newest(tmp_path).name == "step-000003"


def test_a_file_too_many_is_a_fault(state, tmp_path):
    path = checkpoint.save(state, tmp_path, identity="x")
    (path / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert "model-00002-of-00002" in checkpoint.damage(path)


def _save_with_small_files(state, folder, limit, answers):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    state.step = 2
    try:
        checkpoint.save(state, folder, identity="x")
        answers.put("saved")
    except CheckpointError as error:
        answers.put(str(error))


@pytest.mark.parametrize("share", [0.1, 0.9], ids=["weights", "optimizer"])
def test_a_full_disk_names_the_folder_and_spares_older_checkpoints(state, tmp_path, share):
    """A limit on file sizes makes writes fail inside the kernel, as a full disk does; in a process of its own."""
    older = checkpoint.save(state, tmp_path, identity="x")
    sizes = {"weights": older / "model.safetensors", "optimizer": older / "optimizer.safetensors"}
    limit = int(share * sizes["weights" if share < 0.5 else "optimizer"].stat().st_size)
    context = get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=_save_with_small_files, args=(state, tmp_path, limit, answers))
    process.start()
    message = answers.get()
    process.join()
    assert "step-000002" in message and "Earlier checkpoints are intact" in message and "GB free" in message
    assert checkpoint.newest(tmp_path) == older and [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_atomic_folder_leaves_nothing_after_an_error_and_keeps_the_old_one(tmp_path):
    with atomic_folder(tmp_path / "x") as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "x") as temporary:
        (temporary / "a").write_text("2")
        raise KeyboardInterrupt
    assert (tmp_path / "x" / "a").read_text() == "1" and len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_a_killed_save_are_cleaned_by_the_next(state, tmp_path):
    path = checkpoint.save(state, tmp_path, identity="x")
    shutil.copytree(path, tmp_path / f"{TEMPORARY}new-step-000002")
    assert checkpoint.newest(tmp_path) == path
    state.step = 3
    checkpoint.save(state, tmp_path, identity="x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]
