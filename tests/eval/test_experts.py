"""Experts measured and evened out on files of records, by the function and by the command."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sailvl import cli
from sailvl.data.source import JsonlSource
from sailvl.eval.experts import inputs
from sailvl.model import balance, checkpoint, moe
from sailvl.types import RecordError

VIT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
LM = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "moe_intermediate_size": 32, "max_position_embeddings": 2048, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_processor: Any) -> Any:
    built = checkpoint.build(checkpoint.config_for("nano-moe", processor=tiny_processor, vit=VIT, lm=LM), seed=0).eval()
    with torch.no_grad():
        for block in moe.sparse_layers(built).values():
            block.gate.weight[:6] *= 0.2
    return built


def write(path: Path, pictures: bool, *, rows: int = 4) -> Path:
    draw, lines = random.Random(int(pictures)), []
    for row in range(rows):
        turns = [{"role": "user", "content": f"what is {row} " * 3}]
        if row % 2:
            turns.append({"role": "assistant", "content": f"a circle {row}"})
        line: dict[str, Any] = {"messages": turns}
        if pictures:
            colour = tuple(draw.randrange(256) for _ in range(3))
            Image.new("RGB", (60 + 40 * row, 60), colour).save(path.parent / f"{row}.png")
            line["images"] = [f"{row}.png"]
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return path


def test_inputs_are_those_of_the_records(model: Any, tiny_processor: Any, tmp_path: Path) -> None:
    source = JsonlSource(write(tmp_path / "pictures.jsonl", True))
    made = inputs(model, tiny_processor, source, pictures=True)
    prompt = tiny_processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is 2 " * 3}]}],
        add_generation_prompt=True,
    )
    expected = tiny_processor(text=prompt, images=Image.open(tmp_path / "2.png"), return_tensors="pt")
    assert torch.equal(made[2]["input_ids"], expected["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**made[2]).logits, model(**expected).logits)
    assert "circle" in tiny_processor.tokenizer.decode(made[1]["input_ids"][0]), "answers count too"


def test_records_in_the_wrong_file(model: Any, tiny_processor: Any, tmp_path: Path) -> None:
    for pictures in (True, False):
        source = JsonlSource(write(tmp_path / "rows.jsonl", pictures))
        with pytest.raises(RecordError, match=f"record rows/0 has {int(pictures)} pictures, not"):
            inputs(model, tiny_processor, source, pictures=not pictures)


@pytest.fixture
def sail(capsys: Any, monkeypatch: Any, model: Any, tiny_processor: Any, tmp_path: Path) -> Any:
    """Runs the verb in a folder with a model and both files; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    checkpoint.save(model, tiny_processor, tmp_path / "moe")
    write(tmp_path / "text.jsonl", False)
    write(tmp_path / "pictures.jsonl", True)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sailvl", "experts", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


FILES = ("--text", "text.jsonl", "--multimodal", "pictures.jsonl")


def test_the_command_reports(sail: Any, model: Any, tiny_processor: Any) -> None:
    code, out, _ = sail("moe", *FILES, "--json")
    found = json.loads(out)
    sets = [
        inputs(model, tiny_processor, JsonlSource(Path(name)), pictures=i == 1)
        for i, name in enumerate(("text.jsonl", "pictures.jsonl"))
    ]
    assert code == 0 and found["layers"] == [vars(row) for row in balance.entropy_report(model, *sets)]
    code, out, _ = sail("moe", *FILES)
    assert code == 0 and f"{found['layers'][1]['multimodal']:.3f}" in out and "mean" in out
    code, out, _ = sail("--help")
    assert code == 0 and "  sailvl experts runs/moe --text" in out


def test_the_command_calibrates(sail: Any, model: Any, tmp_path: Path) -> None:
    code, out, _ = sail("moe", *FILES, "--calibrate", "even", "--json")
    found = json.loads(out)
    before, after = (sum(row["multimodal"] for row in found[key]) for key in ("before", "layers"))
    assert code == 0 and found["calibrated"] == "even" and after > before and max(found["text_kl"]) <= 0.02
    even = checkpoint.load(tmp_path / "even")
    assert torch.tensor(even.config.router_bias).any()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), even.parameters(), strict=True))
    code, out, _ = sail("even", *FILES, "--json")
    assert json.loads(out)["layers"] == found["layers"], "the saved model routes as the calibrated one"


def test_the_command_refuses(sail: Any, tiny_model: Any, tiny_processor: Any, tmp_path: Path) -> None:
    checkpoint.save(tiny_model, tiny_processor, tmp_path / "dense")
    for words, message in (
        (("dense", *FILES), "dense: this model has no experts"),
        (("nowhere", *FILES), "neither a model folder"),
        (("moe", *FILES, "--calibrate", "moe"), "moe exists"),
        (("moe", "--text", "pictures.jsonl", "--multimodal", "pictures.jsonl"), "has 1 pictures, not text alone"),
        (("moe", "--text", "no.jsonl", "--multimodal", "pictures.jsonl"), "no.jsonl"),
    ):
        code, out, err = sail(*words)
        assert code == 2 and not out and message in err and "Traceback" not in err
