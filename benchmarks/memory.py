"""Claim: the planned peak memory of a training step is the measured one within a tenth.

    python benchmarks/memory.py --json benchmarks/results/memory.json

Every case is a process of its own that trains the nano model for two steps of two packs on one thread, with tiles of
336 pixels instead of 112, so that attention is a fused kernel as it is on GPUs. Measured, on Linux, is the peak of
resident memory above what there was before the model was built, with an allocator told to give large blocks back at
once: the figure is then what the step needs, not what earlier steps left behind. The same training runs once before and
is thrown away, so that what libraries keep for good (compiled kernels, scratch buffers) is not counted. Planned is
``sailvl.train.memory.step_memory`` without a GPU's context.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sailvl.curriculum import Constant, Parallel, Train
from sailvl.model import checkpoint
from sailvl.train import optim, parallel
from sailvl.train.flops import shape_of
from sailvl.train.memory import parameters, step_memory
from sailvl.train.step import train_step
from sailvl.types import Batch, Mixture

CASES = [
    {"trains": trains, "precision": precision, "checkpointing": checkpointing, "size": size}
    for size, trains, precision, checkpointing in (
        ("nano", ["projector"], "fp32", "none"),
        ("nano", ["projector"], "bf16", "none"),
        ("nano", ["vit", "projector", "lm"], "fp32", "none"),
        ("nano", ["vit", "projector", "lm"], "bf16", "none"),
        ("nano", ["vit", "projector", "lm"], "fp32", "full"),
        ("nano", ["vit", "projector", "lm"], "bf16", "full"),
        ("nano", ["vit", "projector", "lm"], "fp32", "selective"),
        ("nano", ["vit", "projector", "lm"], "bf16", "selective"),
        ("nano", ["lm"], "fp32", "none"),
        ("nano-moe", ["vit", "projector", "lm"], "fp32", "none"),
    )
]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # larger blocks are mapped, and unmapped when freed
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
LENGTHS, TILES, SIDE = (700, 1300, 1000, 1096), 12, 336


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Planned and measured bytes of one case, in a fresh process."""
    call = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(case)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    result = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=600, check=False)
    if result.returncode:
        raise RuntimeError(f"{case}: {result.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def one(case: dict[str, Any]) -> dict[str, float]:
    lengths, tiles = case.get("lengths", LENGTHS), case.get("tiles", TILES)
    stage = Train(
        name="case", data=Mixture(shares={"none": 1.0}), trains=tuple(case["trains"]), steps=2, lanes=2,
        max_tokens=sum(lengths), max_tiles=tiles, lr=1e-4, schedule=Constant(), precision=case["precision"],
        parallel=Parallel(checkpointing=case["checkpointing"]),
    )  # fmt: skip
    config = checkpoint.config_for(case["size"], side=SIDE)

    def train(config: Any, batches: list[Any], stage: Train) -> Any:
        model = checkpoint.build(config, seed=0)
        optim.freeze(model, stage.trains)
        parallel.wrap(model, stage.parallel, precision=case["precision"])
        optimizer = optim.build(model, stage)
        for _ in range(2):
            train_step(model, batches, optimizer, max_grad_norm=1.0, precision=case["precision"])
        return model

    batches = [batch_of(config, lengths, tiles) for _ in range(2)]
    train(config, batches, stage)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    model = train(config, batches, stage)
    measured = resident("VmHWM") - before
    planned = step_memory(config, shape_of(batches[0]), stage, bf16=case["precision"] == "bf16", context=0)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != sum(parameters(config).values()):
        raise AssertionError(f"{count} parameters, not {parameters(config)}")
    pixels = batches[0].tiles_N3SS.nbytes  # are planned, and lay in memory before
    return {"planned": planned.total - pixels, "measured": measured}


def batch_of(config: Any, lengths: Sequence[int], tiles: int) -> Any:
    tokens = sum(lengths)
    ids = torch.randint(0, 1000, (tokens,), generator=torch.Generator().manual_seed(0))
    ids[: tiles * config.tokens_per_tile] = config.image_token_id
    rows = torch.arange(tokens - tokens // 4, tokens - 1)
    return Batch(
        ids_T=ids, positions_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max_length=max(lengths),
        tiles_N3SS=torch.randn(tiles, 3, SIDE, SIDE), rows_R=rows, targets_R=ids[rows + 1], lane=0, state={},
    )  # fmt: skip


def resident(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(one(json.loads(given.case))))
        return
    rows = []
    for case in CASES:
        found = measure(case)
        rows.append({**case, **found, "ratio": round(found["planned"] / found["measured"], 4)})
        print(
            f"{case['size']:9} {'+'.join(case['trains']):18} {case['precision']} {case['checkpointing']:9} planned "
            f"{found['planned'] / 1e6:7.1f} MB, measured {found['measured'] / 1e6:7.1f} MB: {rows[-1]['ratio']:.3f}",
            flush=True,
        )
    worst = max(abs(row["ratio"] - 1) for row in rows)
    print(f"largest error {worst:.1%}")
    if given.json:
        machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
        given.json.write_text(json.dumps({"worst": worst, "cases": rows, **machine}, indent=2) + "\n")
    if worst > 0.1:
        sys.exit(f"a plan is off by {worst:.1%}, more than a tenth")


if __name__ == "__main__":
    main()
