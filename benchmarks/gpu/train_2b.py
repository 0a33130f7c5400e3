"""Target: 40 to 45 % MFU of the 2B model on one H100, all of it training, on 8k packs with half of them picture tokens.

    python benchmarks/gpu/train_2b.py --json benchmarks/results/train_2b_h100.json      # all cases, about 10 minutes
    python benchmarks/gpu/train_2b.py --trains all --compile on --checkpointing selective --steps 30
    python benchmarks/gpu/train_2b.py --size nano --max-tokens 512 --steps 2            # a try, also without a GPU

One GPU of 80 GB or more, bf16, random weights of the released shape (speed does not depend on their values), and the
loader, step and FLOPs of this project. Every sample has a JPEG file, decoded and cut while the GPU trains, and about as
many tokens of text as of picture, half of the text supervised. Each case is a process of its own:

    --trains        "projector" (the rest is frozen) or "all"
    --compile       blocks of encoder and language model compiled, or not
    --checkpointing "none", "selective" or "full" recomputation of the blocks' activations

A case that does not fit into memory is reported as that. Steps are timed as a run makes them: no wait for the GPU
inside the window, which begins and ends with one.

mfu           closed form of the FLOPs (``sailvl.train.flops``: no recomputation, head on supervised rows alone) over
              seconds and the maker's dense bf16 peak; null where the device is not known
tokens        of the language model per second; tiles, samples and supervised tokens beside it
data_wait     seconds of the window in which the step waited for its pack: above a few percent, give more --workers
peak_gb       most memory that tensors took on the GPU ("reserved" is what the allocator took for them)
kernel_check  the first pack's loss by the variable-length attention kernel against document by document, and how far
              their gradients differ in relation to their norm: rounding of bf16, or something is wrong
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from sailvl import assets
from sailvl.curate.synth.source import SynthSource, question_images
from sailvl.curriculum import Parallel, Train
from sailvl.data.source import JsonlSource
from sailvl.doctor import cpu_name
from sailvl.geometry import Tiling
from sailvl.model import attention, checkpoint
from sailvl.model.processing import build_processor
from sailvl.train import flops, hardware, stage
from sailvl.train.step import loss_sum, train_step
from sailvl.types import Mixture

CASES = [
    {"trains": trains, "compile": compiled, "checkpointing": kept}
    for trains, kept in (("projector", "none"), ("all", "none"), ("all", "selective"), ("all", "full"))
    for compiled in ("off", "on")
]
SHAPES = ((0.5, (1, 1)), (0.35, (2, 1)), (0.15, (2, 2)))
"""Shares of pictures by their (columns, rows) in tiles; those of several tiles get a small copy as one more."""


def write(folder: Path, side: int, tokens_per_tile: int, image_share: float, rows: int) -> Path:
    """Records and pictures: ``rows`` questions about drawings of one to four tiles, with text to match."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = assets.lines("train", "en")
    scenes = SynthSource("scenes", families=("count", "chart"), split="train", size=10**6, seed=0, side=side)
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for row in range(rows):
            draw = random.Random(row)
            columns, height = draw.choices([shape for _, shape in SHAPES], [share for share, _ in SHAPES])[0]
            picture = question_images(scenes.record(draw.randrange(10**6)))[0].resize((columns * side, height * side))
            picture.save(folder / "pictures" / f"{row}.jpg", quality=90)
            tiles = columns * height + (columns * height > 1)
            # Lines of the corpus have 9 tokens on average, the end of the line included.
            count = max(2, round(tiles * tokens_per_tile * (1 - image_share) / image_share / 9))
            texts = draw.choices(lines, k=count)
            messages = [
                {"role": "user", "content": "\n".join(texts[: count // 2])},
                {"role": "assistant", "content": "\n".join(texts[count // 2 :])},
            ]
            value = {"id": str(row), "images": [f"pictures/{row}.jpg"], "messages": messages}
            file.write(json.dumps(value) + "\n")
    return folder / "data.jsonl"


def case(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one case in this process and say how fast."""
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    is_cuda = device.type == "cuda"
    text = checkpoint.SIZES[args.size][2]
    side = checkpoint.config_for(args.size).vision_config.image_size
    processor = build_processor(assets.tokenizer_path(), tiling=Tiling(side=side, max_tiles=4))
    config = checkpoint.config_for(args.size, processor=processor, vocab_size=text["vocab_size"])
    with device:
        model = checkpoint.build(config, seed=0)
    trains = checkpoint.PARTS if args.trains == "all" else ("projector",)
    chosen = Train(
        name="bench", data=Mixture(shares={"mixed": 1.0}), trains=trains, steps=10_000, lr=1e-5, lanes=args.packs,
        max_tokens=args.max_tokens, max_tiles=args.max_tokens // config.tokens_per_tile,
        precision="bf16" if is_cuda else "auto",
        parallel=Parallel(compile=args.compile == "on", checkpointing=args.checkpointing),
    )  # fmt: skip
    source = JsonlSource(folder / "data.jsonl", "mixed")
    state = stage.set_up(chosen, model.to(device), processor, {"mixed": source}, args.workers)
    check = kernel_check(state, next(state.loader)[0]) if is_cuda and args.check else None

    def step() -> tuple[Sequence[Any], float]:
        begin = time.perf_counter()
        batches = next(state.loader)
        waited = time.perf_counter() - begin
        train_step(state.model, batches, state.optimizer, max_grad_norm=1.0, precision=state.precision)
        return batches, waited

    for _ in range(args.warmup):
        step()
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    done = [step() for _ in range(args.steps)]
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    state.loader.close()
    shapes = [flops.shape_of(batch) for batches, _ in done for batch in batches]
    work = flops.step_flops(config, shapes, trains)
    name = torch.cuda.get_device_name(device) if is_cuda else cpu_name()
    known = hardware.recognise(name)
    tokens, tiles = sum(sum(shape.lengths) for shape in shapes), sum(shape.num_tiles for shape in shapes)
    mfu = flops.mfu(work, seconds, 1, known.flops if known else None)
    return {
        "mfu": None if mfu is None else round(mfu, 4),
        "tflop_per_second": round(work / seconds / 1e12, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "supervised_tokens_per_second": round(sum(shape.num_supervised for shape in shapes) / seconds, 1),
        "samples_per_second": round(sum(len(shape.lengths) for shape in shapes) / seconds, 2),
        "tiles_per_second": round(tiles / seconds, 2),
        "image_token_share": round(tiles * config.tokens_per_tile / tokens, 3),
        "pack_fill": round(tokens / (len(shapes) * args.max_tokens), 4),
        "seconds_per_step": round(seconds / args.steps, 4),
        "data_wait": round(sum(waited for _, waited in done), 3),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if is_cuda else None,
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if is_cuda else None,
        "attention": "one kernel" if is_cuda and attention.HAS_KERNEL else "document by document",
        "kernel_check": check,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": state.precision,
        "device": name,
    }


@contextmanager
def without_kernel() -> Iterator[None]:
    before, attention.HAS_KERNEL = attention.HAS_KERNEL, False
    try:
        yield
    finally:
        attention.HAS_KERNEL = before


def kernel_check(state: Any, batch: Any) -> dict[str, float] | None:
    """Loss and gradient of a pack by both ways to attend, on the projector's last layer: it is small, and always
    trains."""
    if not attention.HAS_KERNEL:
        return None
    weight, found = state.model.model.multi_modal_projector.linear_2.weight, []
    for way in (without_kernel(), nullcontext()):
        with way:
            loss = loss_sum(state.model, batch, state.precision) / len(batch.rows_R)
            (gradient,) = torch.autograd.grad(loss, weight)
        found.append((loss.item(), gradient))
    (slow, by_document), (fast, by_kernel) = found
    off = ((by_kernel - by_document).norm() / by_document.norm()).item()
    return {"loss_by_document": slow, "loss_by_kernel": fast, "gradient_difference": off}


def child(chosen: dict[str, str], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One case in a process of its own: its figures, or why there are none."""
    words = [sys.executable, str(Path(__file__).resolve()), "--folder", str(folder)]
    words += list(itertools.chain.from_iterable((f"--{name}", value) for name, value in chosen.items()))
    for name in ("size", "device", "max_tokens", "packs", "steps", "warmup", "workers"):
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += [] if args.check else ["--no-check"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ, "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        return {**chosen, "failed": reason[:300]}
    return {**chosen, **json.loads(done.stdout.splitlines()[-1])}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case that was not left out, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[size for size in checkpoint.SIZES if "anyres" not in size], default="2b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trains", choices=["projector", "all"], help="this case alone (with the next two)")
    parser.add_argument("--compile", choices=["off", "on"])
    parser.add_argument("--checkpointing", choices=["none", "selective", "full"])
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a pack")
    parser.add_argument("--packs", type=int, default=1, help="packs per update")
    parser.add_argument("--image-share", type=float, default=0.5, help="of the tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--workers", type=int, default=8 if torch.cuda.is_available() else 0, help="that decode")
    parser.add_argument("--no-check", dest="check", action="store_false", help="leave out kernel_check")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.folder is not None:  # a case
        print(json.dumps(case(args, args.folder)))
        return
    wanted = [x for x in CASES if all(getattr(args, key) in (None, value) for key, value in x.items())]
    config = checkpoint.config_for(args.size)
    results = []
    with tempfile.TemporaryDirectory() as name:
        rows = 300 + (args.steps + args.warmup) * args.packs * args.max_tokens // (2 * config.tokens_per_tile)
        write(Path(name), config.vision_config.image_size, config.tokens_per_tile, args.image_share, rows)
        for chosen in wanted:
            results.append(child(chosen, args, Path(name)))
            print(json.dumps(results[-1]), flush=True)
    if args.json:
        value = {
            "claim": "MFU of training on packs with real pictures, one GPU",
            "size": args.size,
            "max_tokens": args.max_tokens,
            "packs_per_update": args.packs,
            "steps": args.steps,
            "cases": results,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
            "command": shlex.join(["python", *sys.argv]),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(value, indent=2) + "\n")
    if all("failed" in one for one in results):
        raise SystemExit(
            f"all {len(results)} cases failed; the first: {results[0]['failed']}" if results else "no case"
        )


if __name__ == "__main__":
    main()
