"""benchmarks/inference.py: its checkpoints load, its arms measure what they say, at the nano size."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

from sailvl.model import checkpoint

PATH = Path(__file__).parents[1] / "benchmarks" / "inference.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("benchmarks.inference")


@pytest.fixture(scope="module")
def base(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("checkpoints")
    script.folders("nano", base)
    return base


def test_the_checkpoint_has_the_released_layout_and_loads_whole(script: ModuleType, base: Path) -> None:
    folder = base / "sailvl-nano"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = set(index["weight_map"])
    prefixes = {"vision_model", "mlp1", "language_model"}
    assert {name.split(".")[0] for name in names} == prefixes and "language_model.lm_head.weight" in names
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        assert {stored.get_tensor(name).dtype for name in names} == {torch.bfloat16}
        assert sum(stored.get_tensor(name).nbytes for name in names) == index["metadata"]["total_size"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "sailvl" and "llm_config" in config and "text_config" not in config
    model = checkpoint.load(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.dtype == torch.bfloat16


def test_a_2b_checkpoint_would_have_the_size_of_the_release(script: ModuleType) -> None:
    with torch.device("meta"):
        model = script.SailVLForConditionalGeneration(checkpoint.config_for("2b"))
        opponent = script.InternVLForConditionalGeneration(script.internvl_config("2b"))
    stored = sum(value.numel() for value in model.parameters()) + model.lm_head.weight.numel()
    assert 2 * stored == 5_461_130_240
    ours, theirs = (sum(value.numel() for value in m.parameters()) for m in (model, opponent))
    assert abs(ours - theirs) < 0.001 * ours


def test_written_once_and_never_half(script: ModuleType, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def refuse(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "save_file", refuse)
    script.folders("nano", base)  # there already
    with pytest.raises(KeyboardInterrupt):
        script.folders("nano", tmp_path)
    assert not (tmp_path / "sailvl-nano").exists()
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    with pytest.raises(SystemExit, match="GB are free; use --dir"):
        script.folders("nano", tmp_path)


def test_every_arm_is_measured_and_the_result_written(
    script: ModuleType, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(arm: str, part: str, args):
        return json.loads(json.dumps(script.part(type(args)(**{**vars(args), "arm": arm, "part": part}))))

    monkeypatch.setattr(script, "child", here)
    monkeypatch.setattr(script, "bandwidth", lambda threads: 40.0)
    out = tmp_path / "new" / "inference.json"
    options = ["--size", "nano", "--dir", str(base), "--tokens", "4", "--prompts", "6", "30", "--repeats", "1"]
    script.main([*options, "--threads", "1", "--json", str(out)])
    result = json.loads(out.read_text())
    assert set(result["arms"]) == set(script.ARMS) and result["bandwidth_gb_per_second"] == 40.0
    for arm, found in result["arms"].items():
        assert found["tile_seconds"] > 0 and found["load"]["cold"]["seconds"] > 0
        for prompt in found["prompts"].values():
            assert prompt["decode_tokens_per_second_best"] >= prompt["decode_tokens_per_second"] > 0
            assert prompt["floor_ms"] == pytest.approx(prompt["bytes_per_token"] / 40e6, abs=0.006)
        assert ("rows_4_tokens_per_second" in found) == (arm in ("bf16", "int8"))
    sizes = {arm: found["prompts"]["6"]["bytes_per_token"] for arm, found in result["arms"].items()}
    assert sizes["bf16"] == sizes["generate"] == sizes["transformers"] and 0.5 < sizes["int8"] / sizes["bf16"] < 0.52
    printed = capsys.readouterr().out
    assert all(arm in printed for arm in script.ARMS) and "int8 / bf16" in printed


def test_an_arm_runs_in_a_process_of_its_own_and_its_failure_ends_all(script: ModuleType, base: Path) -> None:
    args = argparse.Namespace(size="nano", dir=base, threads=1, repeats=1, tokens=2, prompts=[4])
    found = script.child("int8", "warm", args)
    assert 0 < found["returned_after"] <= found["seconds"] and found["peak_gb"] >= found["resident_after_gb"] > 0
    args.dir = base / "nowhere"
    with pytest.raises(SystemExit, match=r"int8 \(warm\) failed"):
        script.child("int8", "warm", args)
