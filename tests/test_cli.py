"""The command: what it says, what it exits with, and that its verbs and options change only on purpose."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from PIL import Image

from sailvl import cli
from sailvl.geometry import ImagePolicy
from sailvl.model import checkpoint
from sailvl.model.processing import SailVLProcessor
from sailvl.recipes.nano import NANO
from sailvl.types import Completion

FROZEN = Path(__file__).with_name("cli_frozen.txt")
ROOT = Path(__file__).parents[1]


def command(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    call = [sys.executable, "-m", "sailvl", *words]
    return subprocess.run(call, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["sailvl", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture
def sail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda *words: call(capsys, monkeypatch, *words)


def test_cli_frozen() -> None:
    group: Any = typer.main.get_command(cli.app)
    lines = [f"sailvl {' '.join(sorted(opt for p in group.params for opt in p.opts))}"]
    for name, verb in sorted(group.commands.items()):
        arguments = [p.name for p in verb.params if p.param_type_name == "argument"]
        options = sorted(opt for p in verb.params if p.param_type_name == "option" for opt in p.opts)
        lines.append(" ".join([name, *arguments, *options]))
    assert "\n".join(lines) + "\n" == FROZEN.read_text(encoding="utf-8"), (
        "verbs or options changed: change the file too"
    )


@pytest.mark.parametrize("verb", "convert run train plan ask eval score experts soup report doctor".split())
def test_every_verb_has_help_with_an_example(sail: Any, verb: str) -> None:
    code, out, _ = sail(verb, "--help")
    assert code == 0 and f"  sailvl {verb}" in out


HEAVY = """
import sys
from sailvl.cli import main
try:
    main()
except SystemExit:
    print([name for name in sys.modules if name in ("torch", "transformers")], file=sys.stderr)
"""


@pytest.mark.parametrize("words", [["--help"], ["plan", "nano"], ["plan", "nano", "--json"], ["train", "--help"]])
def test_help_and_plan_load_no_torch(words: list[str]) -> None:
    result = subprocess.run([sys.executable, "-c", HEAVY, *words], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stderr.strip() == "[]" and result.stdout


def test_plan_lists_the_stages(sail: Any) -> None:
    code, out, _ = sail("plan", "nano", "stages.pretrain.steps=1234")
    assert code == 0 and "1,234" in out and "longcot" in out
    code, out, _ = sail("plan", "nano", "--shrink", "10", "--json")
    names = [row["name"] for row in json.loads(out)["stages"]]
    assert names == [stage.name for stage in NANO.stages] and len(set(names)) == len(names)


FLAT = """
model: {kind: fresh, side: 28, max_tiles: 1}
sources:
  mine: {kind: jsonl, path: rows.jsonl}
trains: [projector, lm]
steps: 2
max_tokens: 128
max_tiles: 4
lr: 1e-4
schedule: {kind: constant}
"""


def test_a_broken_recipe_shows_everything_at_once(sail: Any, tmp_path: Path) -> None:
    text = (
        FLAT.replace("steps: 2", "stepz: 2").replace("lr: 1e-4", "lr: fast").replace("[projector, lm]", "[projektor]")
    )
    (tmp_path / "a.yaml").write_text(text + "lanes: yes\n", encoding="utf-8")
    code, out, err = sail("train", "a.yaml", "max_tokens=0", "--json")
    assert code == 2 and not out
    assert [line.removeprefix("a.yaml: ").partition(":")[0] for line in err.splitlines()] == [
        "trains.0",
        "steps",
        "lanes",
        "max_tokens",
        "lr",
        "stepz",
    ]
    assert "did you mean 'steps'?" in err and "Traceback" not in err


def test_faults_of_the_graph_have_the_paths_of_the_file(sail: Any, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(FLAT + "fresh: [projector]\ndata: {shares: {mien: 1}}\n", encoding="utf-8")
    code, _, err = sail("plan", "a.yaml", "trains=[lm]")
    assert code == 2
    assert err.splitlines() == [
        "a.yaml: data.shares.mien: no source has this name; did you mean 'mine'?",
        "a.yaml: fresh: a fresh projector that is not trained stays random; add it to trains",
    ]


@pytest.mark.parametrize(
    ("words", "code", "say"),
    [
        (["plan", "nanno"], 2, "did you mean 'nano'?"),
        (["plan", "none.yaml"], 2, "none.yaml: No such file"),
        (["run", "some/where"], 2, "No such file"),
        (["train", "nano"], 2, "nano: no such file"),
        (["plan", "nano", "stages.multitask.lrr=1"], 2, "did you mean 'lr'?"),
        (["plan"], 2, "RECIPE"),
        (["pln"], 2, "pln"),
        (["run", "nano", "--workers", "-1"], 2, "workers"),
        (["report", "."], 2, "no run here"),
        (["soup", "a", "--out", "b"], 2, "at least two"),
        (["ask", "hello"], 2, "sailvl run nano"),
        (["ask", "hello", "--model", "nowhere"], 2, "nowhere: neither a model folder"),
        (["ask", "one.png", "two.png", "what?"], 2, "two.png: no such file"),
        (["ask", " "], 2, "empty"),
        (["plan", "."], 2, "Is a directory"),
    ],
)
def test_wrong_input_is_a_line_and_exit_code_2(sail: Any, words: list[str], code: int, say: str) -> None:
    found, out, err = sail(*words)
    assert (found, out) == (code, "") and say in err and "Traceback" not in err


def test_pictures_are_checked_together_before_a_model_is_loaded(sail: Any, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello", encoding="utf-8")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(tmp_path / "fine.png")
    code, _, err = sail("ask", "text.png", "fine.png", "empty.jpg", "What?")
    assert code == 2 and [line.split(":")[0] for line in err.splitlines()] == ["text.png", "empty.jpg"]
    code, _, err = sail("ask", "fine.png")
    assert code == 2 and "the question comes last" in err


def test_debug_shows_the_traceback_anywhere_in_the_line(sail: Any) -> None:
    for words in (["--debug", "plan", "nanno"], ["plan", "nanno", "--debug"]):
        code, _, err = sail(*words)
        assert code == 2 and "Traceback" in err and "did you mean" in err


def test_no_words_is_help(sail: Any) -> None:
    code, out, _ = sail()
    assert code == 0 and "doctor" in out


def test_a_failure_is_exit_code_1_without_traceback(sail: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "curriculum.json").write_text("{}", encoding="utf-8")
    (tmp_path / "report.html").mkdir()  # cannot be replaced by a file
    code, out, err = sail("report", ".")
    assert (code, out) == (1, "") and "Traceback" not in err and err


def test_doctor_finds_this_machine_sound(sail: Any) -> None:
    code, out, _ = sail("doctor", "--json")
    found = json.loads(out)
    assert found["ok"] == (code == 0)
    assert {"torch", "transformers", "threads", "bf16", "memory", "disk", "corpus"} <= {
        f["name"] for f in found["findings"]
    }


def test_doctor_says_what_is_broken(sail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sailvl import doctor

    monkeypatch.setitem(doctor.NEEDS, "torch", (99,))
    monkeypatch.setitem(doctor.NEEDS, "no-such-package-here", (1,))
    code, out, _ = sail("doctor")
    assert code == 1 and "pip install 'torch>=99'" in out and "no-such-package-here" in out


# ---- one small model, asked all sorts of things ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its data, and the run that ``sailvl train`` made of them."""
    folder = tmp_path_factory.mktemp("mine")
    rows = []
    for index in range(8):
        Image.new("RGB", (30, 30), (index * 30, 100, 50)).save(folder / f"{index}.png")
        turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"Colour {index}."}]
        rows.append(json.dumps({"images": [f"{index}.png"], "messages": turns}))
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "mine.yaml").write_text(FLAT, encoding="utf-8")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    result = command("train", str(folder / "mine.yaml"), "--out", str(folder / "run"), "--json", cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    (stage,) = json.loads(result.stdout)["stages"]
    assert stage["steps"] == 2 and Path(stage["model"], "config.json").is_file()
    return folder


PICTURES = {
    "rgba.png": Image.new("RGBA", (50, 40), (255, 0, 0, 100)),
    "palette.png": Image.new("P", (50, 40), 3),
    "grey.jpg": Image.new("L", (50, 40), 90),
    "lossy.webp": Image.new("RGB", (50, 40), (1, 2, 3)),
    "dot.png": Image.new("RGB", (1, 1), (9, 9, 9)),
    "line.png": Image.new("RGB", (10_000, 20), (9, 9, 9)),
    "bits.png": Image.new("1", (17, 3)),
    "deep.png": Image.new("I;16", (20, 20), 40_000),
}


def test_ask_takes_any_picture_and_several_and_none(sail: Any, trained: Path, tmp_path: Path) -> None:
    for name, picture in PICTURES.items():
        picture.save(tmp_path / name)
    model = ["--model", str(trained / "run"), "--max-new-tokens", "3"]
    for paths in ([name] for name in PICTURES):
        code, out, err = sail("ask", *paths, "What is this?", *model)
        assert (code, err) == (0, ""), paths
    code, out, _ = sail("ask", *list(PICTURES)[:3], "哪一个?", *model, "--json")
    found = json.loads(out)
    assert code == 0 and found["images"] == list(PICTURES)[:3] and 1 <= found["tokens"] <= 3
    code, _, _ = sail("ask", "How are <|im_start|> you <img>?", *model)
    assert code == 0
    code, _, err = sail("ask", "dot.png", "<image> or <image>?", *model)
    assert code == 2 and err.count("\n") == 1


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for the model: says what is put in, and keeps the request it was asked."""
    kept: dict[str, Any] = {"text": "nothing"}

    def answer(engine: Any, request: Any, *, aloud: bool) -> Completion:
        kept["request"] = request
        return Completion(text=kept["text"], ids=(1, 2), finish_reason="stop")

    monkeypatch.setattr(cli.asking, "_answer", answer)
    return kept


def test_ask_about_videos_and_pictures(
    sail: Any, trained: Path, tmp_path: Path, clips: ModuleType, said: dict[str, Any]
) -> None:
    (tmp_path / "a.MP4").write_bytes(clips.clip(20))
    (tmp_path / "moves.gif").write_bytes(clips.clip(4, codec="gif", container="gif", size=(32, 16)))
    Image.new("RGB", (10, 8)).save(tmp_path / "still.gif")
    Image.new("RGB", (12, 9)).save(tmp_path / "one.png")
    model = ["--model", str(trained / "run")]
    words = ["one.png", "a.MP4", "moves.gif", "still.gif", "What moves?"]
    code, out, err = sail("ask", *words, *model, "--num-frames", "3", "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == words[:-1]
    request = said["request"]
    assert [picture.frame for picture in request.record.pictures] == [False, *[True] * 6, False]
    assert [image.size for image in request.images] == [(12, 9), *[(64, 48)] * 3, *[(32, 16)] * 3, (10, 8)]
    assert [(p.width, p.height) for p in request.record.pictures] == [image.size for image in request.images]
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "a.MP4").read_bytes()[:1500])
    (tmp_path / "words.webm").write_text("no video")
    code, _, err = sail("ask", "cut.mp4", "words.webm", "absent.mov", "What?", *model)
    assert code == 2 and [line.split(":")[0] for line in err.splitlines()] == ["cut.mp4", "words.webm", "absent.mov"]


def test_ask_answers_about_a_video(sail: Any, trained: Path, tmp_path: Path, clips: ModuleType) -> None:
    (tmp_path / "a.mp4").write_bytes(clips.clip(5))
    code, out, err = sail(
        "ask",
        "a.mp4",
        "What moves?",
        "--num-frames",
        "2",
        "--max-new-tokens",
        "2",
        "--model",
        str(trained / "run"),
        "--json",
    )
    assert code == 0 and json.loads(out)["tokens"] >= 1, err


def test_ask_says_how_pictures_are_cut(sail: Any, trained: Path, tmp_path: Path, said: dict[str, Any]) -> None:
    Image.new("RGB", (12, 9)).save(tmp_path / "one.png")
    model = ["--model", str(trained / "run")]
    assert sail("ask", "one.png", "What?", *model)[0] == 0
    assert said["request"].policy == ImagePolicy()
    assert sail("ask", "one.png", "What?", *model, "--max-tiles", "24", "--msac", "--upscale", "2")[0] == 0
    assert said["request"].policy == ImagePolicy(max_tiles=24, msac=True, upscale=2.0)
    for wrong in (["--max-tiles", "0"], ["--upscale", "9"], ["--num-frames", "0"]):
        code, _, err = sail("ask", "one.png", "What?", *model, *wrong)
        assert code == 2 and wrong[0] in err


def test_ask_by_llama_cpp(sail: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = sail("ask", "What?", "--model", str(trained / "run"), "--gguf", str(tmp_path / "gone.gguf"))
    assert code == 2 and "gone.gguf: no such file" in err
    (tmp_path / "lm.gguf").write_bytes(b"GGUF")
    code, _, err = sail("ask", "What?", "--gguf", str(tmp_path / "lm.gguf"), "--quant", "int8")
    assert code == 2 and "neither --quant nor --adapter" in err
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    code, _, err = sail("ask", "What?", "--model", str(trained / "run"), "--gguf", str(tmp_path / "lm.gguf"))
    assert code == 1 and "pip install llama-cpp-python" in err


def test_ask_draws_boxes(sail: Any, trained: Path, tmp_path: Path, said: dict[str, Any]) -> None:
    Image.new("RGB", (400, 200), "white").save(tmp_path / "photo.png")
    call = ["ask", "photo.png", "Where is it?", "--model", str(trained / "run"), "--boxes"]
    said["text"] = "<ref>it</ref><box>[[250,500,500,1000]]</box>"
    code, out, err = sail(*call, "found.png")
    assert (code, out, err) == (0, said["text"] + "\n", "1 box: found.png\n")
    drawn = Image.open(tmp_path / "found.png")
    assert drawn.size == (400, 200) and drawn.getpixel((100, 150)) != (255, 255, 255) == drawn.getpixel((150, 150))
    code, out, err = sail(*call, "found.jpg", "--json")
    place = {"x1": 100.0, "y1": 100.0, "x2": 200.0, "y2": 200.0, "label": "it", "corners": []}
    assert code == 0 and json.loads(out)["boxes"] == [place] and not err
    said["text"] = "I cannot see it."
    code, _, err = sail(*call, "none.png")
    assert code == 0 and err == "no boxes in the answer\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.jpg", "found.png", "photo.png"]
    for out_name, reason in (
        ("photo.png", "the picture itself"),
        ("a.txt", "a picture's name"),
        ("no/a.png", "no folder"),
    ):
        code, _, err = sail(*call, out_name)
        assert code == 2 and reason in err
    code, _, err = sail("ask", "Where?", "--model", str(trained / "run"), "--boxes", "a.png")
    assert code == 2 and "needs a picture" in err


def test_soup_greedy_and_its_base(sail: Any, trained: Path, tmp_path: Path) -> None:
    (model,) = (trained / "run").glob("stages/01-*/model")
    stranger = checkpoint.load(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in stranger.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    checkpoint.save(stranger, SailVLProcessor.from_pretrained(model), tmp_path / "stranger")
    words = ["soup", str(model), str(tmp_path / "stranger"), "--base", str(model)]
    code, _, err = sail(*words, "--out", "half", "--greedy", "gone.jsonl")
    assert code == 2 and "gone.jsonl: no such file" in err
    code, out, err = sail(*words, "--out", "half", "--greedy", str(trained / "rows.jsonl"))
    assert code == 0 and "likely to be noise" in err and "(left out)" in out and out.splitlines()[-1].endswith("half")
    code, out, _ = sail(*words, "--out", "whole", "--json")
    assert code == 0 and len(json.loads(out)["of"]) == 2 and len(json.loads(out)["warnings"]) == 1
    kept, same = (checkpoint.load(folder).lm_head.weight for folder in (tmp_path / "half", model))
    assert torch.equal(kept, same)


def test_training_again_keeps_what_is_done_and_report_and_soup_work(sail: Any, trained: Path, tmp_path: Path) -> None:
    code, out, _ = sail("train", str(trained / "mine.yaml"), "--out", str(trained / "run"))
    assert code == 0 and "kept" in out and "report.html" in out and "\x1b" not in out
    code, out, _ = sail("report", str(trained / "run"), "--json")
    assert code == 0 and Path(json.loads(out)["report"]).is_file()
    model = next((trained / "run").glob("stages/*/model"))
    code, _, _ = sail("soup", str(model), str(model), "--out", "twice")
    assert (
        code == 0 and (tmp_path / "twice/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    )
    code, _, err = sail("soup", str(model), str(model), "--out", "twice")
    assert code == 2 and "exists" in err


def test_ctrl_c_is_exit_code_130_and_says_how_to_continue(trained: Path, tmp_path: Path) -> None:
    words = ["train", str(trained / "mine.yaml"), "steps=100000", "log_every=1", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sailvl", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    for _ in range(600):
        if any(path.stat().st_size for path in tmp_path.glob("run/stages/*/metrics.jsonl")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"continues where it stopped: sailvl train {trained}/mine.yaml steps=100000" in err
    assert list(tmp_path.glob("run/stages/*/checkpoints/step-*"))


# ---- costs, trackers, and data of one's own -------------------------------------------------------------------------


def test_plan_on_gpus_says_what_it_costs_without_torch(tmp_path: Path) -> None:
    words = ["plan", "nano", "--gpus", "1", "--gpu", "l4", "--mfu", "0.3", "--json"]
    result = subprocess.run([sys.executable, "-c", HEAVY, *words], capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(result.stdout)
    assert result.stderr.strip() == "[]"
    assert (found["gpus"], found["gpu"], found["mfu"]) == (1, "l4", 0.3) and found["assumed"]
    trained = [stage.name for stage in NANO.stages if stage.kind == "train"]
    assert [row["name"] for row in found["costs"]] == trained
    assert all(row["fits"] and row["memory"]["total"] > 1.5e9 and not row["advice"] for row in found["costs"])
    assert found["gpu_hours"] == pytest.approx(24 * found["days"])


def test_plan_on_gpus_prints_what_does_not_fit(sail: Any, tmp_path: Path) -> None:
    text = FLAT.replace("{kind: fresh, side: 28, max_tiles: 1}", "{kind: fresh, size: 8b}")
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    code, out, _ = sail("plan", "a.yaml", "--gpus", "8", "lanes=64", "max_tokens=8192", "max_tiles=32")
    assert code == 0 and "does not fit. Fits with parallel.checkpointing=" in out and "CUDA context" in out
    code, out, _ = sail("plan", "a.yaml", "--gpus", "3", "lanes=8")
    assert code == 0 and "set lanes=9" in out
    code, _, err = sail("plan", "a.yaml", "--gpus", "8", "--gpu", "h1000")
    assert code == 2 and "did you mean 'h100'" in err
    code, _, err = sail("plan", "a.yaml", "--gpus", "8", "model={kind: checkpoint, path: nowhere}")
    assert code == 2 and "nowhere: no model folder here" in err


def test_a_tracker_that_is_not_there_stops_before_anything_runs(
    sail: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text(FLAT, encoding="utf-8")
    monkeypatch.setitem(sys.modules, "trackio", None)
    for name, say in (("trackio", "pip install trackio"), ("mlflow", "trackers: tensorboard, wandb, trackio")):
        code, _, err = sail("train", "a.yaml", "--track", name)
        assert code == 2 and say in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


class Tracker(ModuleType):
    """Stands for trackio."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.steps: list[int] = []

    def init(self, **given: Any) -> None:
        self.given = given

    def log(self, values: dict[str, float], step: int) -> None:
        assert values["loss"] > 0
        self.steps.append(step)

    def finish(self) -> None:
        pass


CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}]
SHARED = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Red."}]


def test_training_on_both_usual_forms_mirrors_its_metrics(
    sail: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    rows = [{"images": ["a.png"], "messages": CHAT}, {"image": "a.png", "conversations": SHARED}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "a.yaml").write_text(FLAT + "log_every: 1\n", encoding="utf-8")
    code, _, err = sail("train", "a.yaml", "--track", "trackio", "--json")
    assert code == 0, err
    (stage,) = (tmp_path / "runs/a/stages").iterdir()
    assert tracker.steps == [1, 2] and tracker.given["project"] == "a" and tracker.given["name"] == stage.name
    assert not (stage / "rejects.jsonl").read_text()


@pytest.mark.parametrize(
    ("rows", "recipe", "say"),
    [
        (None, FLAT, "rows.jsonl"),  # no such file
        ([], FLAT, "rows.jsonl"),
        ([{"images": ["a.png"], "messages": CHAT}], FLAT.replace("kind: jsonl", "kind: jsonlines"), "jsonl"),
        ([{"images": ["a.png"], "messages": CHAT}], FLAT.replace("path: rows", "pth: rows"), "did you mean 'path'"),
        ([{"images": ["a.png"], "messages": CHAT}], FLAT.replace("kind: fresh, side", "kind: fresh, sides"), "side"),
        (
            [{"images": ["a.png"], "messages": CHAT}],
            FLAT.replace("{kind: fresh, side: 28, max_tiles: 1}", "{kind: checkpoint, path: nowhere}"),
            "nowhere",
        ),
    ],
)
def test_what_is_wrong_with_own_data_is_said_in_a_line(
    sail: Any, tmp_path: Path, rows: list[Any] | None, recipe: str, say: str
) -> None:
    if rows is not None:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "a.yaml").write_text(recipe, encoding="utf-8")
    code, _, err = sail("train", "a.yaml")
    assert code == 2 and say in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("row", "say"),
    [
        ({"images": ["none.png"], "messages": CHAT}, "none.png"),
        ({"images": ["a.png"], "mesages": CHAT}, "messages"),
        ({"images": ["text.png"], "messages": CHAT}, "text.png"),
        ({"images": ["a.png"], "messages": CHAT[:1]}, ""),
    ],
)
def test_a_broken_row_is_left_out_and_its_reason_kept(sail: Any, tmp_path: Path, row: Any, say: str) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("hello", encoding="utf-8")
    rows = [{"images": ["a.png"], "messages": CHAT}, row]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "a.yaml").write_text(FLAT, encoding="utf-8")
    code, _, err = sail("train", "a.yaml", "--json")
    assert code == 0, err
    (file,) = tmp_path.glob("runs/a/stages/*/rejects.jsonl")
    reasons = [json.loads(line)["reason"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert reasons and all(say in reason for reason in reasons)
