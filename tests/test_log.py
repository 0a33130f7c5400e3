import json
import sys
import warnings
from types import ModuleType

import pytest

from sailvl import log


def test_rows_come_back_in_order_and_not_finite_values_become_null(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with log.MetricsLog(path) as metrics:
        metrics.write(step=1, loss=2.5, event="go")
        metrics.write(step=2, loss=float("nan"), grad_norm=float("inf"))
    assert log.read(path) == [{"step": 1, "loss": 2.5, "event": "go"}, {"step": 2, "loss": None, "grad_norm": None}]


def test_a_line_is_on_disk_before_close(tmp_path):
    metrics = log.MetricsLog(tmp_path / "metrics.jsonl")
    metrics.write(step=1)
    assert log.read(tmp_path / "metrics.jsonl") == [{"step": 1}]
    metrics.close()
    metrics.close()


def test_a_torn_last_line_is_dropped_and_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert log.read(path) == [{"step": 1}]
    with log.MetricsLog(path) as metrics:
        metrics.write(step=2)
    assert log.read(path) == [{"step": 1}, {"step": 2}]


def test_a_line_torn_inside_a_character_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "note": "' + "狗".encode()[:2])
    assert log.read(path) == [{"step": 1}]


def test_truncation_drops_later_steps_and_writing_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with log.MetricsLog(path) as metrics:
        for step in (1, 2, 3, 4):
            metrics.write(step=step)
        metrics.truncate_after(2)
        metrics.write(step=3, again=True)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1}, {"step": 2}, {"step": 3, "again": True},
    ]  # fmt: skip


def test_no_file_reads_as_no_rows(tmp_path):
    assert log.read(tmp_path / "nothing.jsonl") == []


# ---- trackers -------------------------------------------------------------------------------------------------------


class Fake(ModuleType):
    """Stands for wandb, trackio and torch's tensorboard at once; ``broken`` makes every call of that name fail."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list = []
        self.broken: set[str] = set()

    def _do(self, name: str, *values: object) -> None:
        if name in self.broken:
            raise ConnectionError(f"no network for {name}")
        self.calls.append((name, *values))

    def init(self, **given: object) -> None:
        self._do("init", given)

    def log(self, values: dict, step: int) -> None:
        self._do("log", step, values)

    def finish(self) -> None:
        self._do("finish")

    def SummaryWriter(self, folder: str) -> "Fake":
        self._do("writer", folder)
        return self

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self._do("log", step, {key: value})

    def flush(self) -> None:
        self._do("flush")

    def close(self) -> None:
        self._do("close")


@pytest.fixture
def fake(monkeypatch):
    module = Fake("fake")
    for name in ("wandb", "trackio", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, module)
    return module


def rows_of(fake):
    return [(step, values) for name, step, *rest in (c for c in fake.calls if c[0] == "log") for values in rest]


def write(folder, steps, names, keep=None):
    with log.tracking(names), log.MetricsLog(folder / "metrics.jsonl") as metrics:
        if keep is not None:
            metrics.truncate_after(keep)
        for step in steps:
            metrics.write(step=step, loss=1.0 / step, event="go", nothing=None, bad=float("nan"), flag=True)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_are_mirrored_and_a_resumed_run_sends_no_step_twice(fake, tmp_path, name):
    folder = tmp_path / "mine" / "stages" / "01-tune-abc"
    write(folder, (1, 2, 3), [name])
    write(folder, (2, 3, 4), [name], keep=1)  # killed after 3, continued from 1
    assert rows_of(fake) == [(step, {"loss": 1.0 / step}) for step in (1, 2, 3, 4)]
    inits = [call[1] for call in fake.calls if call[0] == "init"]
    assert len(inits) == 2 == sum(call[0] == "finish" for call in fake.calls)
    assert {(init["project"], init["name"], init["resume"]) for init in inits} == {("mine", "01-tune-abc", "allow")}
    assert inits[0].get("id") == inits[1].get("id") and (name != "wandb" or len(inits[0]["id"]) == 16)
    assert [row["step"] for row in log.read(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_tensorboard_gets_a_folder_beside_the_metrics(fake, tmp_path):
    write(tmp_path, (1, 2), ["tensorboard"])
    assert fake.calls[0] == ("writer", str(tmp_path / "tensorboard")) and fake.calls[-1] == ("close",)
    assert rows_of(fake) == [(1, {"loss": 1.0}), (2, {"loss": 0.5})]


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_tracker_is_given_up_with_one_warning(fake, tmp_path, broken):
    fake.broken.add(broken)
    folder = tmp_path / "mine" / "stages" / "tune"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write(folder, (1, 2, 3), ["wandb", "tensorboard"] if broken != "log" else ["wandb"])
    assert [f"no network for {broken}" in str(warning.message) for warning in caught] == [True]
    assert "wandb" in str(caught[0].message) and "metrics.jsonl" in str(caught[0].message)
    assert [row["step"] for row in log.read(folder / "metrics.jsonl")] == [1, 2, 3]
    if broken == "init":  # the other one is not harmed
        assert len(rows_of(fake)) == 3


def test_without_tracking_and_in_other_files_nothing_is_sent(fake, tmp_path):
    with log.MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        metrics.write(step=1, loss=1.0)
    with log.tracking(["wandb"]), log.MetricsLog(tmp_path / "rejects.jsonl") as rejects:
        rejects.write(step=1, id="a")
    assert not fake.calls


def test_unknown_and_missing_trackers_are_named_before_anything_runs(monkeypatch):
    with (
        pytest.raises(ValueError, match=r"unknown tracker 'mlflow'; trackers: tensorboard, wandb, trackio"),
        log.tracking(["mlflow"]),
    ):
        pass
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes importing it fail
    with pytest.raises(ValueError, match="pip install wandb"), log.tracking(["wandb"]):
        pass


def test_the_real_tensorboard_holds_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, (1, 2), ["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
