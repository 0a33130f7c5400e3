"""Losses of twenty steps per kind of stage, kept in the repository: a refactor must not move them.

They were made in fp32 on one thread. On the same processor type they repeat bit for bit; another processor sums in
another order, and training carries the difference on (doubling it every few steps), so elsewhere they are compared to
a relative 1e-4, far below what any change of the mathematics does. Make them anew, knowing why they moved, with

    SAILVL_WRITE_GOLDEN=1 python -m pytest tests/train/test_golden.py
"""

import json
import os
import platform
from pathlib import Path

import pytest
import torch

from sailvl import log
from sailvl.curriculum import WSD, AdaLRS, Constant, Cosine
from sailvl.train.loop import train

FOLDER = Path(__file__).parent.parent / "golden"

STAGES = {
    "projector": {"trains": ("projector",), "fresh": ("projector",), "schedule": Cosine(warmup_steps=2)},
    "vit-projector": {"trains": ("vit", "projector"), "schedule": WSD(warmup_steps=2, decay_steps=5)},
    "all": {"trains": ("vit", "projector", "lm"), "vit_lr_scale": 0.1},
    "adalrs": {
        "trains": ("projector", "lm"),
        "schedule": AdaLRS(base=Constant(warmup_steps=1), window=3, start=0.1, stop=0.9),
    },
}


def processor_type() -> str:
    """What decides the order of sums: the processor's family and the library's build."""
    keys = ("vendor_id", "cpu family", "model\t", "stepping")
    facts = [next((line for line in _cpuinfo() if line.startswith(key)), ":").split(":")[1].strip() for key in keys]
    kind = " ".join(facts).strip() or platform.processor() or platform.machine()
    return f"{kind}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("name", STAGES)
def test_losses_did_not_move(name, stage, model, processor, sources, tmp_path):
    train(stage(**{"steps": 20, "save_every": 100, **STAGES[name]}), model, processor, sources, tmp_path)
    losses = [row["loss"] for row in log.read(tmp_path / "metrics.jsonl")]
    path = FOLDER / f"{name}.json"
    if os.environ.get("SAILVL_WRITE_GOLDEN"):
        path.write_text(json.dumps({"made_on": processor_type(), "losses": losses}, indent=1) + "\n")
    golden = json.loads(path.read_text())
    assert len(losses) == len(golden["losses"]) == 20
    if golden["made_on"] == processor_type():
        assert losses == golden["losses"]
    else:
        assert losses == pytest.approx(golden["losses"], rel=1e-4)
