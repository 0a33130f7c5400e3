"""Claim: on the same samples, packs train at least 1.8 times the supervised tokens a second that padded batches do,
and 1.2 times those of nanoVLM's packing with a correct mask.

    python benchmarks/train/compare.py --venvs FOLDER --json benchmarks/results/train.json [--steps 10] [--arms ...]

Every arm trains the nano model, all of it, from the same weights on the same samples, in a process of its own on one
core: real JPEG files of mixed lengths, decoded, cut and tokenised while it trains (``work.py``, ``data.py``).

    sailvl           this project: its loader's packs and its step
    trainer          transformers' Trainer on this project's model, batches of 8 padded to the longest
    trainer-sorted   the same, an update's samples sorted by length before they are batched
    trainer-single   the same, one sample (or two) a forward pass: next to no padding, as little as a GPU has to do
    trl              TRL's SFTTrainer, as trainer (it refuses to pack pictures)
    nanovlm-fixed    nanoVLM's loop, packing and padding on this project's model, with the document mask it lacks
    nanovlm-leaking  the same as it is: attention across documents, so *not the same work*
    swift            ms-swift's trainer, as trainer (it packs with flash attention alone, and not SAIL-VL2)

**Equal work** is checked, not assumed: in fp32 the loss of the first update must agree within 1e-4 with this project's,
and for the trainers that of the second, after one update, too. The weights are random but attend sharply, so that a
wrong mask shows (nanoVLM's moves the loss by over a thousandth). An arm that disagrees is marked, and gets no ratio.
All have the same samples per update, AdamW, learning rate, clipping, dtype (bf16 autocast where the CPU multiplies it),
all parts trained, and the loss per supervised token of the whole update. nanoVLM has its own AdamW and schedule, and
the same samples per update on average.

On a CPU padding costs its share of the FLOPs and nothing else; on a GPU small batches also leave it idle. Of the arms,
``trainer-single`` shows how much of the figure is padding. An arm that cannot run is reported with the reason.
Ratios are of the clock's seconds; ``ratio_by_processor_time`` stands beside them, for machines that do other things.
``--venvs`` is a folder for what other arms need (environments by pip, nanoVLM's source by git), kept and used again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
import torch
import work as shared

from sailvl.doctor import cpu_name
from sailvl.train.step import resolve_precision

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
NANOVLM = ("https://github.com/huggingface/nanoVLM", "4e0c0961846135c2217f95e54cb4c2d66eb55e42")
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A script of this folder and its options; ``packages`` are what its own environment needs beside the project.

    ``verified`` is how many updates' losses must agree with ours (0: it does other work).
    """

    script: str
    options: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    verified: int = shared.VERIFIED


ARMS = {
    "sailvl": Arm(script="arm_sailvl.py"),
    "trainer": Arm(script="arm_trainer.py"),
    "trainer-sorted": Arm(script="arm_trainer.py", options=("--sort",)),
    "trainer-single": Arm(script="arm_trainer.py", options=("--micro", "1")),
    "trl": Arm(script="arm_trainer.py", options=("--trl",), packages=("trl==1.16.0",)),
    # Its learning rate begins at a fraction of ours, so its second losses are other ones.
    "nanovlm-fixed": Arm(script="arm_nanovlm.py", options=("--mode", "fixed"), verified=1),
    "nanovlm-leaking": Arm(script="arm_nanovlm.py", options=("--mode", "leaking"), verified=0),
    "swift": Arm(script="arm_swift.py", packages=("ms-swift==4.6.0",)),
}


class NotRun(Exception):
    """An arm cannot run; the text says why."""


def environment(arm: Arm, venvs: Path | None) -> str:
    """The Python that runs an arm; its environment is made on first use. Raises NotRun."""
    if not arm.packages:
        return sys.executable
    if venvs is None:
        raise NotRun(f"needs {', '.join(arm.packages)} in an environment of its own: give --venvs")
    folder = venvs / arm.packages[0].partition("=")[0]
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command([sys.executable, "-m", "venv", str(folder)])
        pinned = ["-c", str(ROOT / "constraints.txt")]
        command([str(folder / "bin/python"), "-m", "pip", "install", "-q", *pinned, "-e", str(ROOT), *arm.packages])
        (folder / "ready").touch()
    return str(folder / "bin/python")


def nanovlm_source(venvs: Path | None, url: str) -> str:
    """A checkout of what nanoVLM's training needs. Raises NotRun."""
    if venvs is None:
        raise NotRun("needs nanoVLM's source: give --venvs")
    folder = venvs / "nanovlm"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command(["git", "clone", "-q", "--no-checkout", url, str(folder)])
        command(["git", "-C", str(folder), "checkout", "-q", NANOVLM[1], "--", "train.py", "models", "data"])
        (folder / "ready").touch()
    return str(folder)


def command(words: Sequence[str]) -> None:
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise NotRun(f"{shlex.join(words[:3])} ... failed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")[:300]


def run(arm: Arm, folder: Path, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run of an arm in a process of its own. Raises NotRun."""
    options = [*arm.options]
    if arm.script == "arm_nanovlm.py":
        options += ["--source", nanovlm_source(args.venvs, args.nanovlm)]
    words = [environment(arm, args.venvs), str(HERE / arm.script), "--work", str(folder), "--precision", precision]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    quiet = {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": path,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    try:
        done = subprocess.run(
            [*words, *options], env={**os.environ, **quiet}, capture_output=True, text=True, check=False,
            timeout=args.timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise NotRun(f"took more than {args.timeout} s") from error
    if done.returncode:
        raise NotRun(f"exit code {done.returncode}: {last_line(done.stderr)}")
    found: dict[str, Any] = json.loads(last_line_of_json(done.stdout))
    return found


def last_line_of_json(text: str) -> str:
    return next(line for line in reversed(text.splitlines()) if line.startswith("{"))


def figures(found: dict[str, Any], work: shared.Work) -> dict[str, Any]:
    """Speeds of one run. Useful FLOPs are those of the packed samples: what every arm would need at least."""
    useful = sum(work.flops) * found["supervised"] / sum(work.supervised)
    seconds = found["seconds"]
    return {
        "supervised_tokens_per_second": round(found["supervised"] / seconds, 1),
        "samples_per_second": round(found["samples"] / seconds, 2),
        "useful_gflop_per_second": round(useful / seconds / 1e9, 2),
        "padding_share": round(1 - found["real_tokens"] / found["positions"], 4),
        "peak_gb": round(found["peak_gb"], 3),
        **{key: found[key] for key in ("samples", "supervised", "updates", "losses", "versions")},
        "seconds": round(seconds, 2),
        "cpu_seconds": round(found["cpu_seconds"], 2),
        "slowest_update_over_median": round(
            max(found["seconds_per_update"]) / statistics.median(found["seconds_per_update"]), 2
        ),
        "load": round(found["load"], 1),
    }


def agreement(losses: Sequence[float], ours: Sequence[float], count: int) -> float:
    """The largest relative difference of the first ``count`` losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses[:count], ours[:count], strict=True))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    work = shared.prepare(folder, updates=args.steps, max_tokens=args.max_tokens, lanes=args.lanes, write=data.write)
    precision = resolve_precision(args.precision, torch.device("cpu"))
    load = os.getloadavg()[0]
    runs: dict[str, list[dict[str, Any]]] = {}
    refused: dict[str, str] = {}
    for repeat in range(args.repeats):
        names = [name for name in dict.fromkeys(["sailvl", *args.arms]) if name not in refused]
        for name in reversed(names) if repeat % 2 else names:
            try:
                runs.setdefault(name, []).append(figures(run(ARMS[name], folder, precision, args), work))
            except NotRun as reason:
                refused[name] = str(reason)
                runs.pop(name, None)
            print(f"{name}: {refused.get(name) or runs[name][-1]['supervised_tokens_per_second']}", file=sys.stderr)
    if "sailvl" not in runs:
        raise SystemExit(f"sailvl did not run: {refused['sailvl']}")
    return {
        "claim": "supervised tokens per second on the same samples and mask, this project / others, one CPU core",
        "arms": {name: summary(name, found, runs["sailvl"]) for name, found in runs.items()},
        "not_run": refused,
        "work": described(work),
        "precision": precision,
        "load_at_start": round(load, 1),
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}, python {platform.python_version()}",
        "command": shlex.join(["python", *sys.argv]),
    }


def summary(name: str, runs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median speed, what the losses say, and the ratio to ours where the work is the same."""
    speed = "supervised_tokens_per_second"
    found = sorted(runs, key=lambda one: one[speed])[len(runs) // 2]
    count = ARMS[name].verified
    off = agreement(found["losses"], ours[0]["losses"], count or 1)
    same = bool(count) and off <= TOLERANCE
    ratios = [b[speed] / a[speed] for a, b in zip(runs, ours, strict=True)]
    # The same by processor time, which other processes on the machine disturb less than they do the clock.
    share = [b["supervised"] / b["cpu_seconds"] / (a["supervised"] / a["cpu_seconds"])
             for a, b in zip(runs, ours, strict=True)]  # fmt: skip
    return {
        **found,
        "verified_updates": count,
        "loss_difference": off,
        "same_work": same,
        "sailvl_is_times_as_fast": round(statistics.median(ratios), 3) if same else None,
        "sailvl_is_times_as_fast_at_other_work": None if same else round(statistics.median(ratios), 3),
        "ratio_by_processor_time": round(statistics.median(share), 3),
    }


def described(work: shared.Work) -> dict[str, Any]:
    samples = shared.Samples(work)
    lengths = sorted(samples[row].num_tokens for rows in work.updates for row in rows)
    marks = {"min": 0.0, "quarter": 0.25, "median": 0.5, "three_quarters": 0.75, "max": 1.0}
    return {
        "updates": len(work.updates), "samples": len(lengths), "samples_per_update": [len(x) for x in work.updates],
        "tokens": sum(work.tokens), "supervised_tokens": sum(work.supervised), "flops": sum(work.flops),
        "sample_tokens": {name: lengths[round(share * (len(lengths) - 1))] for name, share in marks.items()},
        "pack_fill": round(sum(work.tokens) / (work.max_tokens * work.lanes * len(work.updates)), 4),
        "max_tokens": work.max_tokens, "packs_per_update": work.lanes,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{'arm':17}{'superv. tok/s':>14}{'samples/s':>11}{'GFLOP/s':>9}{'padding':>9}{'GB':>7}{'sailvl is':>11}  work"
    ]
    for name, arm in result["arms"].items():
        ratio = arm["sailvl_is_times_as_fast"] or arm["sailvl_is_times_as_fast_at_other_work"]
        lines.append(
            f"{name:17}{arm['supervised_tokens_per_second']:14.0f}{arm['samples_per_second']:11.2f}"
            f"{arm['useful_gflop_per_second']:9.1f}{arm['padding_share']:9.3f}{arm['peak_gb']:7.2f}{ratio:10.2f}x"
            f"  {'same' if arm['same_work'] else 'other'} (first loss off by {arm['loss_difference']:.1e})"
        )
    return "\n".join(lines + [f"{name}: not run: {reason}" for name, reason in result["not_run"].items()])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="updates per run; a multiple of 5 suits nanoVLM's groups")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of a pack")
    parser.add_argument("--lanes", type=int, default=4, help="packs per update")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--venvs", type=Path, help="folder for environments and sources of other arms")
    parser.add_argument("--nanovlm", default=NANOVLM[0], help="where to clone nanoVLM from")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one run may take")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    print(table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
