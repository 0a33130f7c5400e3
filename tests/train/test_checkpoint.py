import json
import resource
import shutil
from multiprocessing import get_context

import pytest
import torch

from sailvl.model.checkpoint import CheckpointError
from sailvl.train import checkpoint
from sailvl.train.loop import set_up
from sailvl.train.state import take_snapshot
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
    assert not (checkpoint.save(state, tmp_path, identity="x") / "snapshot.pt").exists()


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
    data = bytearray((path / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "optimizer.pt").write_bytes(data)


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
    torch.save({"state": Trap()}, path / "optimizer.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        checkpoint.load(state, path, identity="x")
    assert "code ran" not in capsys.readouterr().out


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
    sizes = {"weights": older / "model.safetensors", "optimizer": older / "optimizer.pt"}
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
    with checkpoint.atomic_folder(tmp_path / "x") as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), checkpoint.atomic_folder(tmp_path / "x") as temporary:
        (temporary / "a").write_text("2")
        raise KeyboardInterrupt
    assert (tmp_path / "x" / "a").read_text() == "1" and len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_a_killed_save_are_cleaned_by_the_next(state, tmp_path):
    path = checkpoint.save(state, tmp_path, identity="x")
    shutil.copytree(path, tmp_path / f"{checkpoint.TEMPORARY}new-step-000002")
    assert checkpoint.newest(tmp_path) == path
    state.step = 3
    checkpoint.save(state, tmp_path, identity="x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]
