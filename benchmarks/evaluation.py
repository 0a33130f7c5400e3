"""Claim: on a CPU, batched evaluation answers a benchmark twice as fast as asking one sample at a time the usual way,
and three times as fast where pictures come again, once answers have some 30 tokens; 100,000 answers are kept in linear
time.

    python benchmarks/evaluation.py --json benchmarks/results/evaluation.json

All arms answer one table: the same nano model, prompts, pictures, tiles and order, greedily.

    batched         ``eval.predict`` with the local engine as ``sailvl eval`` starts it, with its memory of pictures
    one at a time   the same with ``capacity=1`` and no memory: what batching alone is worth
    generate        a loop over rows that calls transformers' ``generate``: how the published evaluation works

In "distinct" every row has a picture of its own; in "circular" each picture is asked about four times with rotated
options, as in MMBench.

How long answers are decides the figure: a picture must be read before the first token, and on a CPU reading 32 pictures
together costs 32 times one, while generating 32 answers together costs little more than one. So every length is a row
of its own: a bare letter (2 tokens), a sentence, a short reasoning. Weights are fresh and nothing ends an answer early.
Answers of the arms are compared. Arms alternate; a ratio is that of the shortest times over the repeats. Processor
seconds stand beside: they do not count the time that others took.

The third part keeps the answers of an engine that costs nothing: seconds per answer in each tenth of one run (a disk
or a busy neighbour slows some of them), and what a second run takes to find that nothing is left to ask.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from PIL import Image

from sailvl import assets
from sailvl.data.encode import encode
from sailvl.doctor import cpu_name
from sailvl.engine.answers import sayable
from sailvl.engine.fake import Fake
from sailvl.engine.local import Local
from sailvl.eval.predict import Asking, predict, request
from sailvl.eval.table import Table, read
from sailvl.model import checkpoint
from sailvl.model.processing import build_processor

WORDS = "the a red small round picture shows two people near an old house and under blue light of its open door".split()
ARMS = {
    "batched": {"capacity": 32, "feature_cache_mb": 256},
    "one at a time": {"capacity": 1, "feature_cache_mb": 0},
    "generate": {},
}
TENTHS = 10


def picture(draw: random.Random) -> str:
    """A noise picture in the sizes of benchmarks' smaller ones, as base64 PNG."""
    size = draw.randint(60, 300), draw.randint(60, 300)
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def table(path: Path, rows: int, *, per_picture: int) -> Table:
    """A multiple-choice table of random words; ``per_picture`` rotations share a picture by its row's index."""
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "image", "question", "A", "B", "C", "D", "answer"])
        for number in range(rows // per_picture):
            question = " ".join(draw.choices(WORDS, k=draw.randint(8, 30)))
            options, image = draw.sample(WORDS, 4), picture(draw)
            for turn in range(per_picture):
                rotated = options[turn:] + options[:turn]
                shown = image if turn == 0 else number
                writer.writerow([number + turn * 1_000_000, shown, question, *rotated, "ABCD"[-turn]])
    return read(path, name="MMBench_DEV_EN_V11" if per_picture > 1 else "MMStar")


def evaluate(model, processor, asked: Table, folder: Path, arm: str, tokens: int) -> dict:
    """One evaluation from nothing: its seconds, answers by index, and how many tiles were encoded."""
    if arm == "generate":
        return generate(model, processor, asked, tokens)
    engine = Local(model, processor, **ARMS[arm])
    engine.end_ids = set()
    began, busy = time.perf_counter(), time.process_time()
    done = predict(engine, asked, Asking(kind="MCQ", max_new_tokens=tokens), folder, model="nano")
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    if done.failures or done.asked != len(asked.rows):
        raise SystemExit(f"{arm}: {done.asked} of {len(asked.rows)} rows asked, failures {done.failures}")
    found = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    if any(row["tokens"] != tokens for row in found):
        raise SystemExit(f"{arm}: answers of other lengths than {tokens} tokens")
    answers = {row["index"]: row["raw"] for row in found}
    return {"seconds": seconds, "processor": busy, "answers": answers, "tiles": engine.encoded_tiles}


@torch.inference_mode()
def generate(model, processor, asked: Table, tokens: int) -> dict:
    """The table by the library's ``generate``, row by row."""
    asking, answers, tiles = Asking(kind="MCQ", max_new_tokens=tokens), {}, 0
    _, banned = sayable(processor, model.config.text_config.vocab_size, model.generation_config.eos_token_id)
    began, busy = time.perf_counter(), time.process_time()
    for number, row in enumerate(asked.rows):
        prompt = request(asked, number, asking)
        example = encode(prompt.record, prompt.images, processor, generate=True, policy=prompt.policy)
        ids = torch.from_numpy(example.ids_T)[None]
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.from_numpy(example.tiles_N3SS),
            max_new_tokens=tokens, do_sample=False, eos_token_id=[], pad_token_id=0, suppress_tokens=banned,
        )  # fmt: skip
        answers[str(row["index"])] = processor.tokenizer.decode(made[0, ids.shape[1] :])
        tiles += example.num_tiles
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    return {"seconds": seconds, "processor": busy, "answers": answers, "tiles": tiles}


def throughput(args: argparse.Namespace, folder: Path, name: str, per_picture: int) -> dict:
    """All arms on one table, for every length of answer."""
    processor = build_processor(assets.tokenizer_path(), tiling=checkpoint.scheme_for("nano"), system_message="")
    model = checkpoint.build(checkpoint.config_for("nano", processor=processor), seed=0).eval()
    asked = table(folder / f"{name}.tsv", args.rows, per_picture=per_picture)
    for arm in ARMS:
        evaluate(model, processor, asked, folder / name / f"warm-{arm}", arm, 1)
    lengths = {}
    for tokens in args.tokens:
        runs: dict[str, list[dict]] = {arm: [] for arm in ARMS}
        for repeat in range(args.repeats):
            for arm in list(ARMS)[:: -1 if repeat % 2 else 1]:
                out = folder / name / f"{tokens}-{repeat}-{arm}"
                runs[arm].append(evaluate(model, processor, asked, out, arm, tokens))
        lengths[f"{tokens} tokens"] = compared(runs, args.rows)
    return {"rows": args.rows, "pictures": args.rows // per_picture, **lengths}


def compared(runs: dict[str, list[dict]], rows: int) -> dict:
    """``ratios`` is of the shortest times of each other arm against the batched one."""
    fast = runs["batched"]
    others = [arm for arm in runs if arm != "batched"]
    same = {
        arm: sum(text == runs[arm][0]["answers"][index] for index, text in fast[0]["answers"].items()) for arm in others
    }
    if min(same.values()) < 0.9 * rows:
        raise SystemExit(f"of {rows} answers so many agree with the batched ones: {same}")

    def ratio(arm: str, kind: str) -> float:
        return round(min(run[kind] for run in runs[arm]) / min(run[kind] for run in fast), 3)

    return {
        "ratios": {arm: ratio(arm, "seconds") for arm in others},
        "processor_ratios": {arm: ratio(arm, "processor") for arm in others},
        "answers_per_second": {arm: round(rows / min(run["seconds"] for run in of), 2) for arm, of in runs.items()},
        "seconds": {arm: [round(run["seconds"], 3) for run in of] for arm, of in runs.items()},
        "processor_seconds": {arm: [round(run["processor"], 3) for run in of] for arm, of in runs.items()},
        "encoded_tiles": {arm: of[0]["tiles"] for arm, of in runs.items()},
        "same_answers": same,
    }


def keeping(answers: int, folder: Path) -> dict:
    """Seconds per kept answer at the beginning and at the end of one long evaluation."""
    path = folder / "long.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "question", "answer"])
        writer.writerows([number, f"what is {number}?", number] for number in range(answers))
    asked, asking, out = read(path), Asking(kind="VQA", max_new_tokens=8), folder / "long"
    reached: list[float] = []
    engine = Fake(lambda request: reached.append(time.perf_counter()) or "an answer of five words", capacity=32)
    predict(engine, asked, asking, out, model="fake")
    again = time.perf_counter()
    if predict(engine, asked, asking, out, model="fake").asked:
        raise SystemExit("a second run asked again")
    again = time.perf_counter() - again
    part = answers // TENTHS
    tenths = [(reached[end - 1] - reached[end - part]) / (part - 1) for end in range(part, answers + 1, part)]
    half = len(tenths) // 2
    return {
        "answers": answers,
        "microseconds_per_answer_by_tenth": [round(1e6 * seconds, 1) for seconds in tenths],
        "later_over_earlier_half": round(statistics.median(tenths[half:]) / statistics.median(tenths[:half]), 3),
        "seconds_to_find_nothing_left": round(again, 2),
        "megabytes": round((out / "predictions.jsonl").stat().st_size / 1e6, 2),
    }


def measure(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "claim": "answers per second, batched / one at a time; seconds per kept answer, later / earlier half",
            "distinct": throughput(args, folder, "distinct", 1),
            "circular": throughput(args, folder, "circular", 4),
            "keeping": keeping(args.answers, folder),
        }
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return found | {
        "arms": ARMS,
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores, load {before:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after, {args.threads} thread(s), {torch.backends.cpu.get_cpu_capability()}",
        "versions": versions,
        "command": " ".join(["python", *sys.argv]),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=48, help="questions per table, a multiple of 4")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 32, 128], help="new tokens per answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--answers", type=int, default=100_000, help="answers kept in the last part")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a run of seconds, whose figures mean nothing")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rows, args.tokens, args.repeats, args.answers = 8, [3], 1, 500
    if args.rows < 4 or args.rows % 4:
        parser.error("--rows must be a multiple of 4")
    text = json.dumps(measure(args), indent=2)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
