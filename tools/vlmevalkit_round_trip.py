"""Our figures against VLMEvalKit's own, from the same prediction files: small tables, mixed answers, every rule that
needs no judge and no network.

    python tools/vlmevalkit_round_trip.py --vlmevalkit DIR --python PY [--model FOLDER] [--seed N] [--out OUT]

DIR is a checkout of the toolkit and PY a Python that can import it (its requirements weigh gigabytes, so it has an
environment of its own; pandas 2, since its WeMath rule does not run with pandas 3). The script

1. writes benchmark files in the toolkit's layout into OUT/LMUData: random questions, pictures of a few pixels;
2. answers them with ``sailvl.eval``: once by a script that is right, wrong, wordy, empty and unreadable in turn, and,
   with --model, once by that model (``sailvl eval`` in a process of its own);
3. scores the exported files by ``sailvl score``, and by the toolkit's ``run.py --mode eval --reuse --judge
   exact_matching``, which reads the same files and writes .xlsx copies of them;
4. scores those .xlsx copies by ``sailvl score`` once more, and prints all three figures per number. Exit status 1 if
   any two differ by more than 1e-6 percent, or the toolkit left a set out.

One thing in the toolkit is switched off for this: it would replace a benchmark file whose checksum is not the published
one by a download. Nothing else of it is touched.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sailvl.engine.fake import Fake
from sailvl.eval.bench import Plan, evaluate_files, open_table
from sailvl.eval.scoring.yesno import PERCEPTION, REASONING
from sailvl.eval.table import write_tsv

MIXED = "mixed"
LAUNCH = """
import runpy, sys
sys.path.insert(0, ".")
import vlmeval.dataset as sets
for kind in sets.DATASET_CLASSES:
    kind.DATASET_MD5 = {}
sys.argv = ["run.py", *sys.argv[1:]]
runpy.run_path("run.py", run_name="__main__")
"""
WORDS = [*"cat dog house tree red blue seven None 12 3.5 北京".split(), "an old boat", "the left one", "two people"]
UNREADABLE = [
    "",
    "I cannot tell.",
    "A or B",
    "None",
    "nan",
    "答案是B",
    "Sorry, I can't help with images of people yet.",
]

Row = dict[str, Any]
Pairs = list[tuple[str, str, float]]
"""What a number is called; its name among our scores ("" is the score itself); the toolkit's value in our unit."""


@dataclass(frozen=True, kw_only=True)
class Trip:
    """A benchmark: its rows (``reply`` is the scripted answer, not part of the table), and how the toolkit's result
    file (its rows as texts) corresponds to our scores."""

    name: str
    rows: list[Row]
    theirs: Callable[[list[dict[str, str]]], Pairs]


# ---- tables ---------------------------------------------------------------------------------------------------


def picture(draw: random.Random) -> str:
    buffer = io.BytesIO()
    size, colour = (draw.randint(16, 48), draw.randint(16, 48)), tuple(draw.choices(range(256), k=3))
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def choice_reply(draw: random.Random, options: dict[str, str], truth: str) -> str:
    letter = truth if draw.random() < 0.6 else draw.choice(list(options))
    text = options[letter]
    forms = [letter, f"{letter}.", f"({letter})", f"The answer is {letter}.", text, f"**{letter}**: {text}",
             f"Answer: {letter}", f"{letter}) {text}, because it is so", f"I think that it is {text}"]  # fmt: skip
    return draw.choice(UNREADABLE) if draw.random() < 0.15 else draw.choice(forms)


def choices(draw: random.Random, count: int, **columns: list[str]) -> list[Row]:
    rows = []
    for index in range(count):
        options = dict(zip("ABCD"[: draw.randint(3, 4)], draw.sample(WORDS, 4), strict=False))
        truth = draw.choice([letter for letter in options if options[letter] != "None"])
        extra = {name: draw.choice(values) for name, values in columns.items()}
        reply = choice_reply(draw, options, truth)
        row = {"index": index, "image": picture(draw), "question": f"Which one, {index}?", **options}
        rows.append({**row, "answer": truth, **extra, "reply": reply})
    return rows


def rotated(draw: random.Random, groups: int) -> list[Row]:
    rows = []
    for group in range(groups):
        texts, image = draw.sample([word for word in WORDS if word != "None"], 4), picture(draw)
        knows = draw.random() < 0.6
        for turn in range(4):
            options = dict(zip("ABCD", texts[turn:] + texts[:turn], strict=True))
            truth = "ABCD"[-turn % 4]
            reply = draw.choice([truth, f"{truth}.", options[truth]]) if knows else choice_reply(draw, options, truth)
            row = {"index": group + turn * 1_000_000, "image": image if turn == 0 else group, "question": "Which?"}
            kind = "coarse" if group % 2 else "fine"
            rows.append({**row, **options, "answer": truth, "category": kind, "split": "dev", "reply": reply})
    return rows


def yes_no_reply(draw: random.Random, truth: str) -> str:
    said = truth if draw.random() < 0.65 else draw.choice(["Yes", "No"])
    forms = [said, said.lower(), f"{said}, it is.", f"The answer is {said}", f"{said}!", f"{said}\n", "yes and no"]
    return draw.choice(["", "Maybe", "None"]) if draw.random() < 0.1 else draw.choice(forms)


def mme(draw: random.Random) -> list[Row]:
    rows = []
    for category in (*PERCEPTION, *REASONING):
        for shown in range(2):
            image = picture(draw)
            for truth in draw.sample(["Yes", "No"], 2):
                row = {"index": len(rows), "image": image, "question": "Is it so?", "answer": truth}
                path = f"{category}/{shown}.jpg"
                rows.append({**row, "category": category, "image_path": path, "reply": yes_no_reply(draw, truth)})
    return rows


def pope(draw: random.Random) -> list[Row]:
    rows = []
    for index in range(40):
        truth, names = draw.choice(["Yes", "No"]), ["random", "popular", "adversarial"]
        category = ",".join(draw.sample(names, draw.randint(1, 3)))
        row = {"index": index, "image": picture(draw), "question": "Is there a cat?", "answer": truth}
        rows.append({**row, "category": category, "reply": yes_no_reply(draw, truth)})
    return rows


def hallusion(draw: random.Random) -> list[Row]:
    rows = []
    for kind, part in (("VD", "figure"), ("VS", "chart")):
        for group in range(3):
            for figure in range(2):
                for question in range(2):
                    truth = draw.choice(["Yes", "No"])
                    index = f"{kind}_{part}_0_{group}_{figure}_{question}"
                    row = {"index": index, "image": picture(draw), "question": "Is it so?", "answer": truth}
                    rows.append({**row, "category": kind, "l2-category": part, "reply": yes_no_reply(draw, truth)})
    return rows


def short(draw: random.Random, golds: Callable[[str], Any], forms: list[str], **columns: list[str]) -> list[Row]:
    """Short answers: ``forms`` turn a right word into what is said."""
    pool = ["Blue Car", "12", "3.5", "20%", "no", "two dogs", "St. Mary's", "1,200", "北京", "$5.00", "right-hand"]
    rows = []
    for index in range(30):
        word = draw.choice(pool)
        said = draw.choice(forms).format(word) if draw.random() < 0.7 else draw.choice([*pool, "", "None", "12.3", "4"])
        extra = {name: draw.choice(values) for name, values in columns.items()}
        row = {"index": index, "image": picture(draw), "question": "What is it?", "answer": golds(word), **extra}
        rows.append({**row, "reply": said})
    return rows


def crpe(draw: random.Random) -> list[Row]:
    rows = []
    for group in range(8):
        for turn in range(4):
            truth = f"({'ABCD'[turn]}) a {draw.choice(['cat', 'dog', 'boat'])}"
            said = draw.choice([truth[1], truth[4:], f"It is {truth[4:]}"]) if draw.random() < 0.8 else "B"
            row = {"index": 4 * group + turn, "image": picture(draw), "question": "Which?", "answer": truth}
            rows.append({**row, "category": ["subject", "predicate", "object"][group % 3], "reply": said})
    return rows


def boxes(draw: random.Random) -> list[Row]:
    """Indices begin anew in each split, which the toolkit tells apart by the split's name."""
    rows = []
    for split in ("RefCOCO_val", "RefCOCO_testA", "RefCOCO+_val"):
        for index in range(8):
            width, height = draw.randint(200, 900), draw.randint(200, 900)
            x1, y1 = draw.randint(0, width // 2), draw.randint(0, height // 2)
            x2, y2 = x1 + draw.randint(20, width // 2), y1 + draw.randint(20, height // 2)
            shift = draw.choice([0, 0, 3, 15, width // 2])
            box = x1 + shift, y1, x2 + shift, y2
            parts = [box[0] / width, box[1] / height, box[2] / width, box[3] / height]
            said = [f"[{', '.join(f'{part:.3f}' for part in parts)}]", f"<box>{[round(1000 * p) for p in parts]}</box>",
                    "there is none", "", f"({box[0]}, {box[1]}), ({box[2]}, {box[3]})"]  # fmt: skip
            row = {"index": index, "image": picture(draw), "question": "Where is it?", "split": split, "width": width}
            truth = {"height": height, "bbox_x1": x1, "bbox_y1": y1, "bbox_x2": x2, "bbox_y2": y2}
            rows.append({**row, **truth, "reply": draw.choice(said)})
    return rows


def steps(draw: random.Random) -> list[Row]:
    """Without empty answers: at one of those the toolkit stops."""
    rows: list[Row] = []
    for number in (2, 3):
        for problem in range(10):
            for part in [*(str(step + 1) for step in range(number)), "multi"]:
                truth = draw.choice("ABC")
                said = truth if draw.random() < 0.7 else draw.choice("ABC")
                row = {"index": len(rows), "image": picture(draw), "question": "How much?", "A": "1", "B": "2 cm"}
                row |= {"C": "none", "answer": truth, "ID": f"{number}-{problem}", "key": f"{number}steps_{part}"}
                said = draw.choice([said, f"Answer: {said}", f"<{said}>. So it is", f"because 2 > 1. Answer {said}"])
                rows.append({**row, "knowledge concept": "Angles", "reply": said})
    return rows


# ---- the toolkit's result files -------------------------------------------------------------------------------


def by_split(rows: list[dict[str, str]]) -> Pairs:
    """Accuracies of multiple-choice sets: a row per split, "none" without splits, fractions."""
    if len(rows) > 1:
        return [(row["split"], f"split/{row['split']}", 100 * float(row["Overall"])) for row in rows]
    named = [(name, f"category/{name}", 100 * float(rows[0][name])) for name in ("coarse", "fine") if name in rows[0]]
    return [("overall", "", 100 * float(rows[0]["Overall"])), *named]


def first(column: str, ours: str = "", scale: float = 1.0) -> Callable[[list[dict[str, str]]], Pairs]:
    return lambda rows: [(column, ours, scale * float(rows[0][column]))]


def of_mme(rows: list[dict[str, str]]) -> Pairs:
    points = {part: float(rows[0][part]) for part in ("perception", "reasoning")}
    names = [("perception", "perception (of 2000)"), ("reasoning", "reasoning (of 800)")]
    return [("sum / 28", "", sum(points.values()) / 28), *((part, ours, points[part]) for part, ours in names)]


def of_hallusion(rows: list[dict[str, str]]) -> Pairs:
    rates = {name: float(rows[0][name]) for name in ("aAcc", "fAcc", "qAcc")}
    return [("mean of three", "", sum(rates.values()) / 3), *((name, name, value) for name, value in rates.items())]


def of_vqa(rows: list[dict[str, str]]) -> Pairs:
    splits = [(name, f"split/{name}", float(rows[0][name])) for name in ("human", "augmented") if name in rows[0]]
    return [("overall", "", float(rows[0]["Overall"])), *splits]


def of_steps(rows: list[dict[str, str]]) -> Pairs:
    """Shares of 525 with two decimals, the number of problems in brackets behind."""
    pairs = [("strict (2 digits)", "strict", float(rows[0]["Score (Strict)"].rstrip("%")))]
    names = {"InsufficientKnowledge (Strict)": "IK", "InadequateGeneralization (Strict)": "IG"}
    names |= {"RoteMemorization (Strict)": "RM strict", "RoteMemorization (Loose)": "RM loose"}
    return pairs + [(ours, ours, float(rows[0][name].partition("(")[2].rstrip(")"))) for name, ours in names.items()]


def of_boxes(rows: list[dict[str, str]]) -> Pairs:
    found = {row["Split"]: float(row["Precision@1"]) for row in rows}
    average = found.pop("Average")
    return [("average", "", average), *((name, f"split/{name}", value) for name, value in found.items())]


def trips(seed: int) -> Iterator[Trip]:
    draw = random.Random(seed)
    yield Trip(name="MMStar", rows=choices(draw, 40, category=["coarse", "fine"]), theirs=by_split)
    yield Trip(name="AI2D_TEST", rows=choices(draw, 30), theirs=by_split)
    splits = {"split": ["validation", "dev"], "category": ["Art", "Law"]}
    yield Trip(name="MMMU_DEV_VAL", rows=choices(draw, 40, **splits), theirs=by_split)
    yield Trip(name="MMBench_DEV_EN_V11", rows=rotated(draw, 16), theirs=by_split)
    yield Trip(name="MME", rows=mme(draw), theirs=of_mme)
    yield Trip(name="POPE", rows=pope(draw), theirs=first("Overall"))
    yield Trip(name="HallusionBench", rows=hallusion(draw), theirs=of_hallusion)
    forms = ["{}", "{}.", "the {}", " {} "]
    ten = short(draw, lambda word: str([word] * 6 + [word.lower()] * 2 + ["other", "a " + word]), forms)
    yield Trip(name="TextVQA_VAL", rows=ten, theirs=of_vqa)
    two = short(draw, lambda word: str([word, f"the {word}"]), ["{}", "{}s", "{} of it", "{} or something else"])
    yield Trip(name="DocVQA_VAL", rows=two, theirs=of_vqa)
    one = short(draw, lambda word: str([word]), ["{}", "{} ", "{}0", "about {}"], split=["human", "augmented"])
    yield Trip(name="ChartQA_TEST", rows=one, theirs=of_vqa)
    yield Trip(name="OCRVQA_TESTCORE", rows=short(draw, lambda word: str([word]), forms), theirs=of_vqa)
    yield Trip(name="GQA_TestDev_Balanced", rows=short(draw, str, ["{}", " {}", "a {}"]), theirs=of_vqa)
    kinds = ["Regular Text Recognition", "Doc-oriented VQA", "Handwritten Mathematical Expression Recognition"]
    read = short(draw, lambda word: str([word, word + "!"]), ["{}", "It says {}", "{}\n"], category=kinds)
    yield Trip(name="OCRBench", rows=read, theirs=first("Final Score Norm"))
    yield Trip(name="CRPE_RELATION", rows=crpe(draw), theirs=first("total", scale=100.0))
    yield Trip(name="RefCOCO", rows=boxes(draw), theirs=of_boxes)
    yield Trip(name="WeMath", rows=steps(draw), theirs=of_steps)


# ---- both sides -----------------------------------------------------------------------------------------------


def answer(every: list[Trip], lmu: Path, out: Path) -> None:
    """Ask the scripted engine, and export what it said."""
    texts = {}
    for trip in every:
        columns = dict.fromkeys(key for row in trip.rows for key in row if key != "reply")
        write_tsv(lmu / f"{trip.name}.tsv", trip.rows, list(columns))
        rows = open_table(lmu / f"{trip.name}.tsv").rows
        texts |= {f"{trip.name}/{row['index']}": one["reply"] for row, one in zip(rows, trip.rows, strict=True)}
    engine = Fake(lambda request: texts[request.record.id], capacity=32)
    paths = [lmu / f"{trip.name}.tsv" for trip in every]
    _, faults = evaluate_files(engine, paths, Plan(), out, model=MIXED, model_id=MIXED)
    if faults:
        raise SystemExit("\n".join(faults))


def ours(file: Path, name: str) -> dict[str, float]:
    """Scores of a prediction file by ``sailvl score``; "" is the score itself."""
    command = [sys.executable, "-m", "sailvl", "score", str(file), "--data", name, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return {**found["scores"], "": found["score"]}


def toolkit(args: argparse.Namespace, models: list[str], names: list[str], lmu: Path, out: Path) -> None:
    """Let the toolkit score what is exported below ``out``."""
    launcher = args.out / "launch.py"
    launcher.write_text(LAUNCH)
    options = ["--data", *names, "--model", *models, "--work-dir", str(out), "--mode", "eval", "--reuse"]
    command = [str(args.python), str(launcher), *options, "--judge", "exact_matching"]
    environment = {**os.environ, "LMUData": str(lmu), "PRED_FORMAT": "xlsx", "EVAL_FORMAT": "csv"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=args.vlmevalkit, env=environment, capture_output=True, text=True)
    (args.out / "toolkit.log").write_text(done.stdout + done.stderr)
    print("the toolkit:", " ".join(command[1:]), f"-> exit {done.returncode}, {args.out / 'toolkit.log'}")


def result(folder: Path, model: str, name: str) -> list[dict[str, str]] | None:
    """The toolkit's result file of a set, as rows of texts."""
    files = [path for kind in ("acc", "score") for path in sorted(folder.glob(f"{model}_{name}*_{kind}.*"))]
    files = [path for path in files if path.suffix in (".csv", ".json")]
    if not files:
        return None
    if files[0].suffix == ".json":
        return [{key: str(value) for key, value in json.loads(files[0].read_text()).items()}]
    with files[0].open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def compare(trip: Trip, model: str, out: Path) -> bool:
    """Print a line per number; whether all agree."""
    exported = max((out / model).glob(f"T*/{model}_{trip.name}.tsv"))
    copies = sorted((out / model).glob(f"T*/{model}_{trip.name}.xlsx"))
    rows = result(copies[-1].parent, model, trip.name) if copies else None
    if (
        rows is None
        and trip.name == "WeMath"
        and not sum(ours(exported, "WeMath")[f"{k} strict"] for k in ("CM", "RM"))
    ):
        print(f"{model:<8} {trip.name:<22} the toolkit stops where no combined problem is right")
        return True
    if rows is None:
        print(f"{model:<8} {trip.name:<22} the toolkit has no result")
        return False
    mine, again = ours(exported, trip.name), ours(copies[-1], trip.name)
    same = True
    for label, key, theirs in trip.theirs(rows):
        near = 0.00501 if "2 digits" in label else 1e-6
        agree = max(abs(mine.get(key, -1.0) - theirs), abs(again.get(key, -1.0) - theirs)) < near
        figures = f"{mine.get(key, float('nan')):10.4f} {theirs:10.4f} {again.get(key, float('nan')):10.4f}"
        print(f"{model:<8} {trip.name:<22} {label:<16} {figures}  {'same' if agree else 'DIFFERENT'}")
        same = same and agree
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vlmevalkit", type=Path, required=True, metavar="DIR", help="its checkout")
    parser.add_argument("--python", type=Path, required=True, metavar="PY", help="a Python that can import it")
    parser.add_argument("--model", type=Path, help="a model folder that answers too")
    parser.add_argument("--seed", type=int, default=1, help="other questions and answers")
    parser.add_argument("--out", type=Path, default=Path("runs/round-trip"), help="an empty folder")
    args = parser.parse_args()
    args.out = args.out.absolute()
    lmu, out = args.out / "LMUData", args.out / "outputs"
    lmu.mkdir(parents=True)
    every = list(trips(args.seed))
    names, models = [trip.name for trip in every], [MIXED]
    answer(every, lmu, out)
    if args.model:
        models.append("model")
        command = [sys.executable, "-m", "sailvl", "eval", "--model", str(args.model), "--name", "model", "--out"]
        command += [str(out), "--data", ",".join(names), "--lmu-dir", str(lmu), "--max-new-tokens", "8"]
        print(" ".join(command[2:]))
        subprocess.run(command, check=True)
    toolkit(args, models, names, lmu, out)
    print(f"{'answers':<8} {'set':<22} {'number':<16} {'ours':>10} {'toolkit':>10} {'its .xlsx':>10}")
    agree = [compare(trip, model, out) for model in models for trip in every]
    print(f"{sum(agree)} of {len(agree)} agree")
    raise SystemExit(0 if all(agree) else 1)


if __name__ == "__main__":
    main()
