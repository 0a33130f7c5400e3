"""Whole runs of a tiny curriculum: three stages on a JSON-lines source, on a CPU, in seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sailvl.config import ConfigError, load, to_dict
from sailvl.curriculum import Constant, Curriculum, Fresh, Jsonl, Probe, Soup, Train
from sailvl.lock import LockedError, lock
from sailvl.run import finished_models, read_done, run, settle, write_json
from sailvl.types import Mixture


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for index in range(24):
        Image.new("RGB", (40, 40), (index * 10, 200, 100)).save(folder / f"{index}.png")
        turns = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": f"A colour, {index}."}]
        rows.append({"images": [f"{index}.png"] if index % 3 else [], "messages": turns})
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def tiny(data: Path, **changes: Any) -> Curriculum:
    a = Train(
        name="a",
        data=Mixture(shares={"mine": 1.0}),
        trains=("vit", "projector", "lm"),
        steps=3,
        max_tokens=128,
        max_tiles=8,
        lr=1e-3,
        schedule=Constant(),
        log_every=1,
        save_every=1,
    )
    b = replace(a, name="b", init="a", steps=2, seed=1)
    base = Curriculum(
        name="tiny",
        model=Fresh(side=28, max_tiles=1),
        sources={"mine": Jsonl(path=str(data))},
        stages=(a, b, Soup(name="c", of=("a", "b"))),
    )
    return replace(base, **changes)


def change(curriculum: Curriculum, name: str, **changes: Any) -> Curriculum:
    stages = tuple(replace(stage, **changes) if stage.name == name else stage for stage in curriculum.stages)
    return replace(curriculum, stages=stages)


@pytest.fixture(scope="session")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    reports = run(tiny(data), out)
    assert [(report.name, report.skipped) for report in reports] == [("a", False), ("b", False), ("c", False)]
    return out


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_folder_explains_itself(finished: Path, data: Path) -> None:
    assert load(Curriculum, finished / "curriculum.json") == tiny(data)
    folders = sorted(path.name for path in (finished / "stages").iterdir())
    assert [name[:5] for name in folders] == ["01-a-", "02-b-", "03-c-"]
    for name in folders:
        done = read_done(finished / "stages" / name)
        assert done is not None and name.endswith(done["hash"][:8])
        assert done["seconds"] > 0 and done["versions"]["torch"] and done["hardware"]["threads"]
    first = read_done(finished / "stages" / folders[0])
    assert first is not None
    assert (first["stage"], first["kind"], first["steps"]) == ("a", "train", 3)
    assert first["samples"] > 3 and first["tokens"] > 100 and first["loss"] > 0
    assert "tiny" in (finished / "report.html").read_text(encoding="utf-8")
    assert finished_models(finished)[0].parent.name == folders[2]
    assert not list(finished.glob("stages/*/checkpoints"))


def test_models_load_with_the_auto_classes(finished: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import sailvl  # noqa: F401  (registers the classes)

    folder = finished_models(finished)[0]
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert AutoProcessor.from_pretrained(folder).image_token_id == model.config.image_token_id


def test_finished_stages_are_kept(finished: Path, data: Path) -> None:
    models = [path / "model.safetensors" for path in finished_models(finished)]
    before = [path.stat().st_mtime_ns for path in models]
    lines: list[str] = []
    reports = run(tiny(data), finished, say=lines.append)
    assert all(report.skipped for report in reports) and len(lines) == 3
    assert [path.stat().st_mtime_ns for path in models] == before


def copy(source: Path, target: Path) -> Path:
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)
    return target


def test_a_change_redoes_its_descendants_only_and_can_be_taken_back(finished: Path, data: Path, tmp_path: Path) -> None:
    out = copy(finished, tmp_path / "run")
    changed = change(tiny(data), "b", seed=5)
    assert [report.skipped for report in run(changed, out)] == [True, False, False]
    assert len(list((out / "old").iterdir())) == 2 and len(list((out / "stages").iterdir())) == 3
    assert [report.skipped for report in run(tiny(data), out)] == [True, True, True]
    assert [report.skipped for report in run(changed, out)] == [True, True, True]


def test_changed_data_is_noticed(finished: Path, data: Path, tmp_path: Path) -> None:
    own = copy(data.parent, tmp_path / "data") / data.name
    out = tmp_path / "run"
    curriculum = tiny(own, stages=tiny(own).stages[:1])
    assert not run(curriculum, out)[0].skipped and run(curriculum, out)[0].skipped
    own.write_text(own.read_text(encoding="utf-8").replace("A colour, 3.", "A colour, three."), encoding="utf-8")
    assert not run(curriculum, out)[0].skipped


def test_an_unfinished_stage_is_not_done(finished: Path, data: Path, tmp_path: Path) -> None:
    out = copy(finished, tmp_path / "run")
    last = finished_models(out)[0].parent
    text = (last / "done.json").read_text(encoding="utf-8")
    for content in ("", text[: len(text) // 2], "[]"):
        (last / "done.json").write_text(content, encoding="utf-8")
        assert read_done(last) is None and finished_models(out)[0].parent != last
    (last / "done.json").unlink()
    assert [report.skipped for report in run(tiny(data), out)] == [True, True, False]
    assert weights(last / "model") == weights(finished / "stages" / last.name / "model")


SCRIPT = """
import sys
from pathlib import Path
from sailvl.config import load
from sailvl.curriculum import Curriculum
from sailvl.run import run
run(load(Curriculum, sys.argv[1]), Path(sys.argv[2]), say=lambda line: None)
"""


def start(curriculum: Curriculum, out: Path, tmp_path: Path) -> subprocess.Popen[bytes]:
    write_json(tmp_path / "c.json", to_dict(curriculum))
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "c.json"), str(out)])


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if condition():
            return
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.05)
    raise AssertionError("timed out")


def test_a_killed_run_continues_and_ends_with_the_same_weights(finished: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(tiny(data), out, tmp_path)
    try:
        wait_for(lambda: bool(list(out.glob("stages/01-*/checkpoints/step-*"))), process)
        with pytest.raises(LockedError, match=f"process {process.pid}"):
            run(tiny(data), out)
    finally:
        process.kill()
        process.wait()
    run(tiny(data), out)  # takes the dead process's lock over
    for ours, reference in zip(sorted(out.glob("stages/*")), sorted(finished.glob("stages/*")), strict=True):
        assert ours.name == reference.name and weights(ours / "model") == weights(reference / "model")


def test_faults_and_missing_files_stop_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    sources = {"mine": Jsonl(path="no.jsonl"), "other": Jsonl(path="neither.jsonl"), "unused": Jsonl(path="x")}
    both = Mixture(shares={"mine": 0.5, "other": 0.5})
    with pytest.raises(ConfigError) as caught:
        run(change(tiny(data, sources=sources), "a", data=both), tmp_path / "run")
    assert [path for path, _ in caught.value.errors] == ["sources.mine", "sources.other"]
    with pytest.raises(ConfigError, match="no earlier stage"):
        run(change(tiny(data), "b", init="z"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settle_keeps_numbers_and_names_in_step(data: Path, tmp_path: Path) -> None:
    curriculum = tiny(data)
    before = settle(curriculum, tmp_path, {})
    for path in before.values():
        path.mkdir()
    turned = replace(
        curriculum, stages=(*curriculum.stages[:1], replace(curriculum.stages[0], name="z"), *curriculum.stages[1:])
    )
    after = settle(turned, tmp_path, {})
    assert after["b"].name == before["b"].name.replace("02-", "03-") and after["b"].is_dir()
    assert sorted(path.name[:3] for path in (tmp_path / "stages").iterdir()) == ["01-", "03-", "04-"]


def test_ctrl_c_saves_and_the_next_run_goes_on(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    curriculum = change(tiny(data, stages=tiny(data).stages[:1]), "a", steps=2000, save_every=1000)

    def interrupt() -> None:
        while not any(path.stat().st_size for path in out.glob("stages/01-*/metrics.jsonl")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(curriculum, out)
    (saved,) = out.glob("stages/01-*/checkpoints/step-*")
    assert 0 < int(saved.name.removeprefix("step-")) < 1000 and not list(out.glob("stages/*/done.json"))
    with lock(out):
        pass


PROBE = Probe(families=("colour", "count"), samples=2, side=28, max_new_tokens=4)


def test_the_probe_is_asked_after_every_stage_and_again_when_it_changes(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    out = copy(finished, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in out.glob("stages/*/model/*")}
    reports = run(tiny(data, probe=PROBE), out)
    for report in reports:
        assert len((report.folder / "eval/answers.jsonl").read_text(encoding="utf-8").splitlines()) == 4
        assert read_done(report.folder) == report.done and report.done["score"] <= 1
    assert all(report.skipped for report in run(tiny(data, probe=PROBE), out))
    more = replace(PROBE, samples=3)
    assert not any(report.skipped for report in run(tiny(data, probe=more), out))
    assert len((reports[0].folder / "eval/answers.jsonl").read_text(encoding="utf-8").splitlines()) == 6
    assert {path: path.stat().st_mtime_ns for path in out.glob("stages/*/model/*")} == before
