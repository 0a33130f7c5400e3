"""A run of two processes under a launcher, killed again and again, ends with the bits of one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sailvl import log

KILLS = 30

RECIPE = """
name: chaos
model: {kind: fresh, size: nano, side: 56, max_tiles: 2}
sources:
  drawn: {kind: synth, families: [count, colour], size: 60, side: 56}
stages:
  - kind: train
    name: base
    data: {shares: {drawn: 1.0}}
    trains: [vit, projector, lm]
    steps: 250
    lanes: 4
    max_tokens: 256
    max_tiles: 4
    lr: 1e-3
    schedule: {kind: adalrs, window: 5, start: 0.05, stop: 0.9, base: {kind: constant}}
    ema: 0.9
    precision: fp32
    save_every: 2
    log_every: 1
    parallel: {save_async: true}
  - {kind: soup, name: same, of: [base]}
"""


def launch(recipe: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "sailvl", "run", str(recipe), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def workers(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rows(out: Path) -> list[dict]:
    found = list(out.glob("stages/01-*/metrics.jsonl"))
    return log.read(found[0]) if found else []


def weights(out: Path) -> dict:
    (folder,) = out.glob("stages/02-*/model")
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills_do_not_change_a_bit(tmp_path, record_property):
    recipe, draw, kills, began = tmp_path / "chaos.yaml", random.Random(0), 0, time.monotonic()
    recipe.write_text(RECIPE)
    assert launch(recipe, tmp_path / "alone").wait(300) == 0
    while kills < KILLS:
        process = launch(recipe, tmp_path / "killed")
        start = rows(tmp_path / "killed")[-1:]
        # Some die before their first step, most between two others; the launcher itself in a third of the cases.
        give_up = time.monotonic() + (draw.uniform(0, 4) if draw.random() < 0.2 else 60)
        while rows(tmp_path / "killed")[-1:] == start and time.monotonic() < give_up and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1.2))
        if process.poll() is not None:
            break
        members = workers(process.pid)
        chosen = [draw.choice(members)] if members and draw.random() < 0.67 else [process.pid, *members]
        for pid in chosen:
            try:
                os.kill(pid, signal.SIGKILL)
                kills += pid == chosen[0]
            except ProcessLookupError:
                pass
        process.wait(120)
    launch(recipe, tmp_path / "killed").wait(300)
    record_property("seconds", round(time.monotonic() - began))
    assert kills == KILLS
    alone, killed = (weights(tmp_path / name) for name in ("alone", "killed"))
    assert alone.keys() == killed.keys() and all((alone[name] == killed[name]).all() for name in alone)
    ran, ended = (
        [(row["step"], row["loss"], row["grad_norm"], row["event"]) for row in rows(tmp_path / name)]
        for name in ("alone", "killed")
    )
    assert ran == ended and {event for _, _, _, event in ran} >= {"snapshot"}
