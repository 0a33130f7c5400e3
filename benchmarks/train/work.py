"""What the arms of ``compare.py`` share: the samples of each update, the model they begin from, clock and result.

``prepare`` writes a folder once: records and pictures, a model with random weights, and ``work.json``, which lists the
samples of every update. They are those that this project's loader packs; the others train on the same ones, update for
update. Every arm runs in a process of its own, pinned to one core, decodes the same JPEG files as it trains, and
reports one line of JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sailvl import assets
from sailvl.curriculum import Train
from sailvl.data.batch import IGNORED
from sailvl.data.encode import encode
from sailvl.data.loader import Loader
from sailvl.data.source import JsonlSource
from sailvl.geometry import Tiling
from sailvl.model import checkpoint
from sailvl.model.processing import SailVLProcessor, build_processor
from sailvl.train import flops, optim
from sailvl.types import Example, Mixture

VERIFIED = 2
"""Updates whose losses are compared, in fp32: the first shows equal samples and masks, the second an equal update."""

LR, SKIPPED = 1e-4, 10
"""Learning rate; steps of the loader left out: the first packs take the long samples of a full buffer."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """``updates``: rows of the data, in the order of the packs; all else per update in the same order."""

    folder: str
    max_tokens: int
    lanes: int
    updates: list[list[int]]
    tokens: list[int]
    supervised: list[int]
    flops: list[int]
    state: dict[str, Any] = field(repr=False)

    @staticmethod
    def read(folder: Path) -> Work:
        return Work(**json.loads((folder / "work.json").read_text()))

    def source(self) -> JsonlSource:
        return JsonlSource(Path(self.folder) / "data.jsonl", "mixed")

    def loader(self, source: JsonlSource) -> Loader:
        """This project's loader, at the first update."""
        loader = make_loader(source, self.max_tokens, self.lanes)
        loader.load_state_dict(self.state)
        return loader

    def model(self, attention: str) -> Any:
        """The model that every arm begins from, fp32, all of it to be trained."""
        path = Path(self.folder) / "model"
        model = checkpoint.load(path, dtype=torch.float32, attn_implementation=attention)
        model.train()
        optim.freeze(model, checkpoint.PARTS)
        return model

    def optimizer(self, model: Any) -> torch.optim.AdamW:
        return optim.build(model, stage(self.max_tokens, self.lanes))


def processor() -> SailVLProcessor:
    return build_processor(assets.tokenizer_path(), tiling=Tiling(side=112, max_tiles=6))


def make_loader(source: JsonlSource, max_tokens: int, lanes: int) -> Loader:
    limits = {"max_tokens": max_tokens, "max_tiles": max_tokens // 16}
    return Loader({"mixed": source}, {"mixed": 1.0}, processor(), lanes=lanes, seed=0, **limits)


def stage(max_tokens: int, lanes: int) -> Train:
    return Train(
        name="bench", data=Mixture(shares={"mixed": 1.0}), trains=checkpoint.PARTS, steps=1, max_tokens=max_tokens,
        max_tiles=max_tokens // 16, lanes=lanes, lr=LR,
    )  # fmt: skip


class Noted(JsonlSource):
    """Remembers whose pictures were asked for: the samples of a step, in the order of its packs."""

    rows: list[int]

    def images(self, record: Any) -> Any:
        self.rows.append(record.meta["row"])
        return super().images(record)


def prepare(folder: Path, *, updates: int, max_tokens: int, lanes: int, write: Callable[[Path, int], Path]) -> Work:
    """Write the folder that the arms read."""
    # As many rows as the loader reads ahead, begins with and trains on; about 120 tokens each at least.
    rows = 256 * lanes + (updates + SKIPPED) * max_tokens * lanes // 120
    source = Noted(write(folder, rows), "mixed")
    source.rows = []
    loader = make_loader(source, max_tokens, lanes)
    for _ in range(SKIPPED):
        next(loader)
    found = Work(
        folder=str(folder), max_tokens=max_tokens, lanes=lanes, updates=[], tokens=[], supervised=[], flops=[],
        state=json.loads(json.dumps(loader.state_dict())),
    )  # fmt: skip
    config = checkpoint.config_for("nano", processor=processor())
    for _ in range(updates):
        source.rows = []
        batches = next(loader)
        if any(batch.rejects for batch in batches):
            raise SystemExit(f"samples were rejected: {[batch.rejects for batch in batches]}")
        shapes = [flops.shape_of(batch) for batch in batches]
        found.updates.append(source.rows)
        found.tokens.append(sum(len(batch.ids_T) for batch in batches))
        found.supervised.append(sum(len(batch.rows_R) for batch in batches))
        found.flops.append(flops.step_flops(config, shapes, checkpoint.PARTS))
    model = sharpened(checkpoint.build(config, seed=0))
    checkpoint.save(model, processor(), folder / "model")
    (folder / "work.json").write_text(json.dumps(asdict(found)))
    return found


def sharpened(model: Any) -> Any:
    """Random weights attend to everything alike and little: made to attend, a wrong mask shows in the loss at once."""
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_norm.weight.mul_(3)
            layer.self_attn.o_proj.weight.mul_(6)
    return model


class Samples(torch.utils.data.Dataset[Any]):
    """Encoded samples by row, decoded when asked for, as this project's loader encodes them."""

    def __init__(self, work: Work) -> None:
        self.source, self.processor = work.source(), processor()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> Example:
        record = self.source.record(row)
        return encode(record, self.source.images(record), self.processor)


def padded(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """Samples as a padded batch: input_ids, attention_mask, labels [B, L] (not shifted) and pixel_values."""
    length = max(example.num_tokens for example in examples)
    shape = (len(examples), length)
    ids_BL, mask_BL, labels_BL = (
        torch.full(shape, pad),
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, IGNORED),
    )
    for row, example in enumerate(examples):
        count = example.num_tokens
        ids_BL[row, :count] = torch.from_numpy(example.ids_T)
        mask_BL[row, :count] = 1
        labels_BL[row, 1:count] = torch.from_numpy(example.targets_T[:-1])
    tiles = torch.cat([torch.from_numpy(example.tiles_N3SS) for example in examples])
    return {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL, "pixel_values": tiles}


@dataclass(kw_only=True)
class Run:
    """What one training run of an arm did. ``positions`` counts what the language model computed, padding included."""

    losses: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    begin: float = 0.0
    cpu_begin: float = 0.0
    cpu_seconds: float = 0.0
    samples: int = 0
    real: int = 0
    positions: int = 0
    supervised: int = 0

    def start(self) -> None:
        self.begin, self.cpu_begin = time.perf_counter(), time.process_time()

    def step(self) -> None:
        """The end of an update."""
        self.ends.append(time.perf_counter())
        self.cpu_seconds = time.process_time() - self.cpu_begin

    def count(self, samples: int, real: int, positions: int, supervised: int) -> None:
        self.samples, self.real = self.samples + samples, self.real + real
        self.positions, self.supervised = self.positions + positions, self.supervised + supervised


def run_arm(train: Callable[[Work, argparse.Namespace, int, str], Run], **options: dict[str, Any]) -> None:
    """The main of an arm: losses of ``VERIFIED`` updates in fp32, then all updates timed, then one line of JSON.

    ``train(work, args, updates, precision)`` trains so many updates from the start.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
    for name, option in options.items():
        parser.add_argument(f"--{name}", **option)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # helper threads of an arm share the core
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    work = Work.read(args.work)
    checked = train(work, args, VERIFIED, "fp32")
    gc.collect()
    forget_peak()
    timed = train(work, args, len(work.updates), args.precision)
    seconds = [end - begin for begin, end in zip([timed.begin, *timed.ends], timed.ends, strict=False)]
    print(json.dumps({
        "losses": checked.losses, "updates": len(timed.ends), "seconds": sum(seconds), "seconds_per_update": seconds,
        "cpu_seconds": timed.cpu_seconds,
        "samples": timed.samples, "real_tokens": timed.real, "positions": timed.positions,
        "supervised": timed.supervised, "peak_gb": peak_gb(), "load": os.getloadavg()[0],
        "versions": {name: module.__version__ for name, module in sorted(sys.modules.items())
                     if name in ("torch", "transformers", "trl", "accelerate", "swift")},
    }))  # fmt: skip


def forget_peak() -> None:
    """Give free memory back and let the peak begin anew, where the system can (Linux with glibc)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak includes the verification: this system cannot forget it", file=sys.stderr)


def peak_gb() -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9
