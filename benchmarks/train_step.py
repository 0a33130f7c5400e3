"""Claim: a packed training step is worth at least 1.5 padded ones, on the same samples with the same loss.

    python benchmarks/train_step.py --json benchmarks/results/train_step.json

Both arms train the nano model on the same samples per update, in the same precision, with the same optimizer and
clipping, one thread each unless --threads says otherwise. The packed arm is this project's step. The padded arm is what
a generic trainer does: pad the samples to the longest, mask attention, take the model's own loss on labels with -100.
It is a bare loop without a trainer's own overhead. Losses of both arms are checked to agree before anything is timed.
Arms alternate within one run; the figure is the median over repeats of the ratio of supervised tokens per second.

Samples are as mixed as instruction data: captions, short questions, long conversations, text alone, two pictures.
Their lengths decide the figure: equal lengths would need no padding, so the padded share is printed beside it. (The
report, section 3.4, packs for the same reason and gives no figure.)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from sailvl import assets
from sailvl.curriculum import Train
from sailvl.data.loader import Loader
from sailvl.doctor import cpu_name
from sailvl.geometry import Tiling
from sailvl.model import checkpoint
from sailvl.model.processing import build_processor
from sailvl.train import optim
from sailvl.train.step import resolve_precision, train_step
from sailvl.types import Batch, Message, Mixture, Picture, Record

WORDS = "the a red small round picture shows two people near an old house and under blue light of its open door".split()

# (share, pictures, turns, words per answer): least and most of each.
KINDS = (
    (0.35, (1, 1), (1, 1), (8, 40)),  # captions
    (0.30, (1, 1), (1, 3), (1, 12)),  # questions with short answers
    (0.15, (1, 1), (3, 8), (20, 80)),  # conversations about a picture
    (0.10, (0, 0), (1, 4), (40, 200)),  # text alone
    (0.10, (2, 3), (1, 3), (5, 60)),  # several pictures
)


class MixedSource:
    """Random words and noise pictures in the shapes of instruction data; row i is always the same."""

    name = "mixed"

    def __len__(self) -> int:
        return 100_000

    def record(self, row: int) -> Record:
        draw = random.Random(row)
        (_, pictures, turns, words) = draw.choices(KINDS, [kind[0] for kind in KINDS])[0]
        sizes = [(draw.randint(60, 300), draw.randint(60, 300)) for _ in range(draw.randint(*pictures))]
        messages = []
        for _ in range(draw.randint(*turns)):
            messages.append(Message(role="user", text=" ".join(draw.choices(WORDS, k=draw.randint(4, 20)))))
            messages.append(Message(role="assistant", text=" ".join(draw.choices(WORDS, k=draw.randint(*words)))))
        return Record(
            id=str(row),
            messages=tuple(messages),
            pictures=tuple(Picture(width=width, height=height, ref=row) for width, height in sizes),
        )

    def images(self, record: Record) -> list[Image.Image]:
        return [Image.effect_noise((p.width, p.height), 64).convert("RGB") for p in record.pictures]

    def fingerprint(self) -> str:
        return "mixed-1"


def padded(batch: Batch, pad: int) -> dict[str, torch.Tensor]:
    """The same samples as a padded batch: input_ids, attention_mask, labels [B, L] and pixel_values."""
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    labels_T = torch.full_like(batch.ids_T, -100)
    labels_T[batch.rows_R + 1] = batch.targets_R

    def rows(values: torch.Tensor, filler: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(values.split(lengths), batch_first=True, padding_value=filler)

    return {
        "input_ids": rows(batch.ids_T, pad),
        "attention_mask": rows(torch.ones_like(batch.ids_T), 0),
        "labels": rows(labels_T, -100),
        "pixel_values": batch.tiles_N3SS,
    }


def padded_step(model, inputs, optimizer, precision: str) -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss = model(**inputs, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def packed_step(model, batch: Batch, optimizer, precision: str) -> float:
    return train_step(model, [batch], optimizer, max_grad_norm=1.0, precision=precision).values[0].item()


def measure(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    precision = resolve_precision(args.precision, torch.device("cpu"))
    processor = build_processor(assets.tokenizer_path(), tiling=Tiling(side=112, max_tiles=6))
    loader = Loader(
        {"mixed": MixedSource()}, {"mixed": 1.0}, processor,
        max_tokens=args.max_tokens, max_tiles=args.max_tokens // 32, seed=0,
    )  # fmt: skip
    # The first packs take the long samples of a full buffer; after these the mixture is as it stays.
    for _ in range(40):
        next(loader)
    batches = [next(loader)[0] for _ in range(args.steps)]
    inputs = [padded(batch, processor.tokenizer.pad_token_id) for batch in batches]
    stage = Train(
        name="bench", data=Mixture(shares={"mixed": 1.0}), trains=checkpoint.PARTS, steps=1,
        max_tokens=args.max_tokens, max_tiles=args.max_tokens // 32, lr=1e-4,
    )  # fmt: skip
    config = checkpoint.config_for("nano", processor=processor)
    arms = {}
    for name, attention, step, data in (
        ("packed", checkpoint.PACKED, packed_step, batches),
        ("padded", "sdpa", padded_step, inputs),
    ):
        model = checkpoint.build(config, seed=0, attn_implementation=attention)
        model.train()
        optim.freeze(model, stage.trains)
        arms[name] = (model, optim.build(model, stage), step, data)

    losses = {name: run(*arm, precision, 2)[0] for name, arm in arms.items()}  # also warms up
    for ours, theirs in zip(losses["packed"], losses["padded"], strict=True):
        if abs(ours - theirs) > 2e-2 * theirs:
            raise SystemExit(f"the arms do not train the same: losses {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(args.repeats):
        for name in sorted(arms, reverse=bool(repeat % 2)):
            seconds[name].append(run(*arms[name], precision, args.steps)[1])
    return result(args, precision, batches, inputs, losses, seconds)


def run(model, optimizer, step, data, precision: str, steps: int) -> tuple[list[float], float]:
    """Losses of ``steps`` steps and the seconds they took."""
    begin = time.perf_counter()
    losses = [step(model, item, optimizer, precision) for item in data[:steps]]
    return losses, time.perf_counter() - begin


def result(args, precision, batches, inputs, losses, seconds) -> dict:
    supervised = sum(len(batch.rows_R) for batch in batches)
    tokens = sum(len(batch.ids_T) for batch in batches)
    lengths = [n for batch in batches for n in (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()]
    ratios = sorted(b / a for a, b in zip(seconds["packed"], seconds["padded"], strict=True))
    return {
        "claim": "supervised tokens per second, packed / padded",
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "supervised_tokens_per_second": {
            name: round(supervised / statistics.median(times), 1) for name, times in seconds.items()
        },
        "seconds": {name: [round(value, 3) for value in times] for name, times in seconds.items()},
        "losses_of_first_steps": losses,
        "precision": precision,
        "samples": len(lengths),
        "sample_tokens": {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)},
        "tokens": tokens,
        "supervised_tokens": supervised,
        "tiles": sum(len(batch.tiles_N3SS) for batch in batches),
        "packed_fill": round(tokens / (args.max_tokens * len(batches)), 4),
        "padded_fill": round(tokens / sum(item["input_ids"].numel() for item in inputs), 4),
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"{args.threads} thread(s), {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}",
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="updates per timed run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    found = measure(args)
    text = json.dumps(found, indent=2)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
