"""``sailvl eval`` itself, killed in the middle with a real model: the second run finishes what the first began."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from sailvl import assets
from sailvl.engine.local import Local
from sailvl.eval.bench import Plan, evaluate_files
from sailvl.eval.table import read_predictions
from sailvl.model import checkpoint
from sailvl.model.processing import build_processor

ROWS, BROKEN = 24, 7
TIMEOUT = 90


def picture(number: int) -> str:
    buffer = io.BytesIO()
    Image.effect_noise((40 + 9 * number, 60), 90).convert("RGB").save(buffer, "PNG")
    data = buffer.getvalue()
    return base64.b64encode(data[: len(data) // 3] if number == BROKEN else data).decode()


def write_table(path: Path, images: list[str], truths: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "image", "question", "answer"])
        for number, (image, truth) in enumerate(zip(images, truths, strict=True)):
            writer.writerow([number, image, f"what is number {number}?", truth])


def command(folder: Path, out: str) -> list[str]:
    words = ["--model", folder / "nano", "--data", folder / "mine.tsv", "--out", folder / out, "--json"]
    words += ["--max-new-tokens", 24, "--batch", 2, "--threads", 1]
    return [sys.executable, "-m", "sailvl", "eval", *map(str, words)]


def undisturbed(folder: Path, engine: Local) -> dict[str, Any]:
    """The same evaluation in this process, in the folder "whole"."""
    out, identity = folder / "whole", checkpoint.fingerprint(folder / "nano")
    plan = Plan(max_new_tokens=24)
    (result,), faults = evaluate_files(engine, [folder / "mine.tsv"], plan, out, model="nano", model_id=identity)
    assert not faults
    return json.loads(json.dumps(asdict(result)))


def answers(folder: Path, out: str) -> list[dict[str, Any]]:
    data = (folder / out / "nano/mine/predictions.jsonl").read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def test_killed_and_run_again_it_gives_what_an_undisturbed_run_gives(tmp_path: Path) -> None:
    folder = tmp_path
    processor = build_processor(assets.tokenizer_path(), tiling=checkpoint.scheme_for("nano"), system_message="")
    model = checkpoint.build(checkpoint.config_for("nano", processor=processor), seed=0)
    model.save_pretrained(folder / "nano")
    processor.save_pretrained(folder / "nano")
    engine = Local(model, processor, capacity=2)
    images = [picture(number) for number in range(ROWS)]
    write_table(folder / "mine.tsv", images, ["nothing"] * ROWS)
    assert undisturbed(folder, engine)["speed"]["asked"] == ROWS
    said = {row["index"]: row["raw"] for row in answers(folder, "whole")}
    # what the model says to every other question becomes the truth: half of its answers are right
    write_table(folder / "mine.tsv", images, [said[str(n)] if n % 2 == 0 else "nothing" for n in range(ROWS)])
    whole = undisturbed(folder, engine)
    assert whole["speed"]["asked"] == 0 and whole["score"] == 50.0 and whole["n"] == ROWS

    file = folder / "cut/nano/mine/predictions.jsonl"
    child = subprocess.Popen(command(folder, "cut"), env=dict(os.environ), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT
    while not file.exists() or file.read_bytes().count(b"\n") < 6:
        assert child.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "no answers came"
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait(TIMEOUT) == -signal.SIGKILL
    before = answers(folder, "cut")
    assert 6 <= len(before) < ROWS and not (file.parent / "scores.json").exists()
    with file.open("ab") as torn:  # as if the kill had come in the middle of a line
        torn.write(b'{"index": "23", "key": "')

    done = subprocess.run(command(folder, "cut"), capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads(done.stdout)["results"]
    after = answers(folder, "cut")
    assert result["speed"]["asked"] == ROWS - len(before)
    assert after[: len(before)] == before
    assert Counter(row["index"] for row in after) == Counter(str(number) for number in range(ROWS))
    assert {row["index"]: row["raw"] for row in after} == {row["index"]: row["raw"] for row in answers(folder, "whole")}
    assert {**result, "speed": None} == {**whole, "speed": None}

    assert list(result["failures"]) == [str(BROKEN)] and f"row {BROKEN + 1} (index {BROKEN})" in str(result["failures"])
    page = (folder / "cut/nano/report.html").read_text()
    assert "1 question could not be asked" in page and f"row {BROKEN + 1} (index {BROKEN})" in page
    exported = sorted((folder / "cut/nano").glob("T*/nano_mine.tsv"))[-1]
    rows = read_predictions(exported)
    assert len(rows) == ROWS and rows[BROKEN]["prediction"] is None
