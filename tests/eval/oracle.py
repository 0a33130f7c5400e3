"""Feed recorded cases of another scorer through ours and write our answers, to be compared case by case.

    python -m tests.eval.oracle DIR OUT.json

DIR holds files ``{family, cases: [{id, input, ..}], ..}``, one per family of cases; OUT becomes
``{family: {"cases": {id: value}, "aggregate": value}}``. Families that are not known here are named on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sailvl.eval import prompts
from sailvl.eval.scoring import METRICS, Row, Verdict
from sailvl.eval.scoring.base import Context, groups, mean
from sailvl.eval.scoring.choices import crpe_groups, rotations, wemath_counts
from sailvl.eval.scoring.graded import mathverse_compare, mmvet_capabilities
from sailvl.eval.scoring.maths import dynamath_worst, mathvista_groups
from sailvl.eval.scoring.vqa import compared, given_box, true_box
from sailvl.eval.scoring.yesno import PERCEPTION, REASONING, hallusion_rates, mme_categories, pope_categories
from sailvl.geometry import Tiling, grid, grids, num_tiles
from sailvl.verify.boxes import box_iou, four_numbers
from sailvl.verify.cleanup import sail_answer, split_think
from sailvl.verify.literal import answers, mapping_literal
from sailvl.verify.math_equal import Latex, math_is_equal
from sailvl.verify.options import (
    by_text,
    first_capital,
    first_word_matches,
    infer,
    option,
    real_world,
)
from sailvl.verify.structured import crpe_right, tempcompass_choice, tempcompass_matching, wemath_letter
from sailvl.verify.text import edit_distance
from sailvl.verify.vqa import anls_distance, norm, punct, relaxed, total
from sailvl.verify.yesno import begins, yes_or_no

Cases = Sequence[Mapping[str, Any]]
Answers = tuple[dict[str, Any], Any]
LATEX = Latex()
PLAIN = Context(latex=LATEX)


class Script:
    """A judge that says what it was told to say, the last line again and again, and counts."""

    def __init__(self, replies: Sequence[str]) -> None:
        self.replies, self.calls = replies, 0

    def __call__(self, prompt: str, *, temperature: float = 0.0) -> str:
        self.calls += 1
        return self.replies[min(self.calls, len(self.replies)) - 1]


def judged(case: Mapping[str, Any]) -> tuple[Context, Script]:
    """The context of a case with the judge that its file scripts."""
    given = case["input"]
    script = Script(given.get("judge_replies") or [given["judge_reply"]])
    return Context(judge=script, latex=LATEX), script


def verdicts(metric: str, cases: Cases) -> list[Verdict]:
    return METRICS[metric].verdicts([case["input"] for case in cases], PLAIN)


def each(function: Callable[[Any], Any]) -> Callable[[Cases], Answers]:
    """A family whose cases stand alone and have no aggregate."""
    return lambda cases: ({case["id"]: function(case["input"]) for case in cases}, None)


def frame(rows: Sequence[Row], found: Sequence[Verdict], scale: float = 0.01) -> list[dict[str, Any]]:
    """One record per split: Overall, and each l2-category and category, as fractions; None where there is no row."""
    records = []
    for split in sorted({str(row.get("split", "none")) for row in rows}):
        part = [pair for pair in zip(rows, found, strict=True) if str(pair[0].get("split", "none")) == split]
        ours, theirs = [row for row, _ in part], [one for _, one in part]
        record: dict[str, Any] = {"split": split, "Overall": scale * mean(one.score for one in theirs)}
        for column in ("l2-category", "category"):
            inside = groups(ours, theirs, column)
            for name in groups(rows, found, column):
                record[_SHORT.get(name, name)] = scale * mean(inside[name]) if name in inside else None
        records.append(record)
    return records


_SHORT = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def by_split(rows: Sequence[Row], found: Sequence[Verdict]) -> dict[str, float]:
    scores = {name: mean(values) for name, values in groups(rows, found, "split").items()}
    return scores | {"Overall": mean(one.score for one in found)}


# ---- options --------------------------------------------------------------------------------------------------


def mcq_match(given: Row) -> dict[str, Any]:
    choices, reply = given["choices"], given["prediction"]
    row = {**choices, "prediction": reply, "answer": given["gt"]}
    [found] = METRICS["mcq"].verdicts([row], PLAIN)
    return {
        "option": option(reply, choices) or False,
        "text": by_text(reply, choices) or False,
        "can_infer": infer(reply, choices) or False,
        "vanilla_hit": {"hit": int(found.score)},
    }


def mcq_judge(cases: Cases) -> Answers:
    values = {}
    for case in cases:
        context, script = judged(case)
        row = {**case["input"]["choices"], "prediction": case["input"]["prediction"], "answer": ""}
        [found] = METRICS["mcq"].verdicts([row], context)
        values[case["id"]] = {"opt": found.extracted, "judge_calls": script.calls}
    return values, None


def hits(metric: str) -> Callable[[Cases], Answers]:
    def family(cases: Cases) -> Answers:
        found = verdicts(metric, cases)
        values = {case["id"]: {"hit": int(one.score)} for case, one in zip(cases, found, strict=True)}
        return values, frame([case["input"] for case in cases], found)

    return family


def circular(cases: Cases) -> Answers:
    rows = [row for case in cases for row in case["input"]]
    found = METRICS["circular"].verdicts(rows, PLAIN)
    values = {case["id"]: {"hit": int(one.score)} for case, one in zip(cases, found, strict=True)}
    return values, frame([group[0] for group in rotations(rows)], found)


def video(metric: str, letters: str, levels: Mapping[str, str]) -> Callable[[Cases], Answers]:
    """``levels``: the column of durations, and those within it, by their name in the aggregate."""

    def family(cases: Cases) -> Answers:
        rows = [{**case["input"], "answer": case["input"]["gt"]} for case in cases]
        found = METRICS[metric].verdicts(rows, PLAIN)
        values = {
            case["id"]: {
                "regex": first_capital(row["prediction"], letters) or "",
                "final": one.extracted or "Z",
                "hit": int(one.score),
            }
            for case, row, one in zip(cases, rows, found, strict=True)
        }
        durations, *columns = levels
        board: dict[str, Any] = {}
        for name in [*groups(rows, found, durations), "overall"]:
            part = [pair for pair in zip(rows, found, strict=True) if name in ("overall", str(pair[0].get(durations)))]
            ours, theirs = [row for row, _ in part], [one for _, one in part]
            board[name] = {"overall": f"{mean(one.score for one in theirs) / 100:.3f}"}
            for column in columns:
                board[name][column] = {key: f"{mean(v) / 100:.3f}" for key, v in groups(ours, theirs, column).items()}
        return values, board

    return family


def mvbench(cases: Cases) -> Answers:
    rows, values = [], {}
    for case in cases:
        given = case["input"]
        letter, choices = given["gt"][1], given["choices"]
        rows.append({**choices, **given, "answer": choices[letter], "candidates": str(list(choices.values()))})
    found = METRICS["mvbench"].verdicts(rows, PLAIN)
    checked = [first_word_matches(row["prediction"], row["gt"][1]) for row in rows]
    for case, right, one in zip(cases, checked, found, strict=True):
        values[case["id"]] = {"check_ans": right, "with_model_none": bool(one.score)}
    by_task = groups(rows, found, "task_type")
    board = {name: [int(sum(v)), len(v), f"{mean(v):.2f}%"] for name, v in by_task.items()}
    done = [one.score for one in found]
    return values, board | {"overall": [int(sum(done)), len(done), f"{mean(done):.2f}%"]}


def tempcompass(kind: str) -> Callable[[Cases], Answers]:
    def family(cases: Cases) -> Answers:
        rows = [{"task_type": kind, **case["input"]} for case in cases]
        found = METRICS["tempcompass"].verdicts(rows, PLAIN)
        values = {}
        for case, row, one in zip(cases, rows, found, strict=True):
            reply, truth = row["prediction"], row["answer"]
            rule: Any
            if kind == "yes_no":
                word = begins(reply)
                rule = False if word == "Unknown" else word.lower()
            elif kind == "caption_matching":
                rule = tempcompass_matching(reply, truth, answers(row["candidates"]))
            else:
                rule = tempcompass_choice(reply, truth)
            values[case["id"]] = {"rating": int(one.score), "rule": "fail" if rule is None else rule}
        return values, mean(one.score for one in found)

    return family


def crpe_line(given: Row) -> dict[str, bool]:
    reply, truth = given["prediction"], given["answer"]
    return {
        "bare_letter": crpe_right(reply, truth[0]),
        "dotted": crpe_right(reply, truth),
        "paren": crpe_right(reply, given["answer_paren"]),
    }


def crpe_relation(cases: Cases) -> Answers:
    rows = [case["input"] for case in cases]
    found = crpe_groups(rows, verdicts("crpe", cases))
    names = ("exist", "subject", "predicate", "object", "total")
    return {}, {name: mean(found[name]) / 100 if name in found else None for name in names}


def wemath(cases: Cases) -> Answers:
    rows = [case["input"] for case in cases]
    found = [Verdict(index=place, score=float(row["hit"])) for place, row in enumerate(rows)]
    counts, whole = wemath_counts(rows, found), 525
    shown = {
        "InsufficientKnowledge": "IK",
        "InadequateGeneralization": "IG",
        "CompleteMastery": "CM",
        "RoteMemorization": "RM",
    }
    board = {}
    for kind in ("strict", "loose"):
        lost = 0.5 * counts["IG"] + counts["IK"] + counts[f"RM {kind}"]
        board[f"Score ({kind.title()})"] = {"0": f"{(whole - lost) / whole:.2%}"}
        for name, short in shown.items():
            count = counts[short] if short in counts else counts[f"{short} {kind}"]
            base = count + counts[f"CM {kind}"] if short == "RM" else whole
            board[f"{name} ({kind.title()})"] = {"0": f"{count / max(base, 1):.2%} ({count})"}
    return {}, board


def wemath_rule(given: Row) -> dict[str, Any]:
    [found] = METRICS["wemath"].verdicts([given], PLAIN)
    return {"joker": bool(found.score), "processed_answer": wemath_letter(given["prediction"])}


# ---- yes and no -----------------------------------------------------------------------------------------------


def yes_no(metric: str, aggregate: Callable[[Sequence[Row], Sequence[Verdict]], Any]) -> Callable[[Cases], Answers]:
    def family(cases: Cases) -> Answers:
        found = verdicts(metric, cases)
        values = {
            case["id"]: {"extracted": one.extracted, "score": bool(one.score)}
            for case, one in zip(cases, found, strict=True)
        }
        return values, aggregate([case["input"] for case in cases], found)

    return family


def mme(rows: Sequence[Row], found: Sequence[Verdict]) -> dict[str, float]:
    points = mme_categories(rows, found)
    sums = {"perception": PERCEPTION, "reasoning": REASONING}
    return {name: sum(points.get(part, 0.0) for part in parts) for name, parts in sums.items()} | points


def hallusion(rows: Sequence[Row], found: Sequence[Verdict]) -> list[dict[str, Any]]:
    board: list[dict[str, Any]] = [{"split": "Overall", **hallusion_rates(rows, found)}]
    for column in ("category", "l2-category"):
        for name in groups(rows, found, column):
            part = [pair for pair in zip(rows, found, strict=True) if pair[0].get(column) == name]
            board.append({"split": name, **hallusion_rates([row for row, _ in part], [one for _, one in part])})
    return board


def pope(rows: Sequence[Row], found: Sequence[Verdict]) -> list[dict[str, Any]]:
    names = {"Overall": "F1", "acc": "accuracy", "precision": "precision", "recall": "recall"}
    board = pope_categories(rows, found)
    return [
        {"split": split or "Overall"} | {name: rates[ours] for name, ours in names.items()}
        for split, rates in board.items()
    ]


def yorn_judge(cases: Cases) -> Answers:
    values = {}
    for case in cases:
        context, script = judged(case)
        [found] = METRICS["yes_no"].verdicts([{**case["input"], "answer": "Yes"}], context)
        values[case["id"]] = {"extracted": found.extracted, "judge_calls": script.calls}
    return values, None


# ---- short answers and boxes ----------------------------------------------------------------------------------


def short(metric: str, method: Any) -> Callable[[Cases], Answers]:
    def family(cases: Cases) -> Answers:
        values = {}
        for case in cases:
            found = compared(case["input"], PLAIN, method)
            score: Any = total(found, method)
            match: list[Any] = list(found.match)
            if method == "relaxed":
                score, match = bool(score), [bool(one) for one in match]
            values[case["id"]] = {"gt": list(found.truths), "pred": found.answer, "match": match, "score": score}
        return values, by_split([case["input"] for case in cases], verdicts(metric, cases))

    return family


def ocrbench(cases: Cases) -> Answers:
    rows, found = [case["input"] for case in cases], verdicts("ocrbench", cases)
    by_name = {name: int(sum(scores)) for name, scores in groups(rows, found, "category").items()}
    own = ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction")
    own = (*own, "Handwritten Mathematical Expression Recognition")
    board: dict[str, float] = {"Text Recognition": sum(n for name, n in by_name.items() if name not in own)}
    board |= {name: by_name.get(name, 0) for name in own}
    board |= {"Final Score": sum(by_name.values()), "Final Score Norm": sum(by_name.values()) / 10}
    return {case["id"]: int(one.score) for case, one in zip(cases, found, strict=True)}, board


def refcoco(cases: Cases) -> Answers:
    rows, values, overlaps = [case["input"] for case in cases], {}, {}
    found = verdicts("refcoco", cases)
    for case, row, one in zip(cases, rows, found, strict=True):
        given, wanted = given_box(row, PLAIN), true_box(row, fractions=False)
        numbers = four_numbers(row["prediction"])
        overlap = box_iou(given, wanted) if given and wanted else 0.0
        overlaps.setdefault(row["split"], []).append(overlap)
        values[case["id"]] = {
            "parsed": numbers and list(numbers),
            "absolute": given and list(given),
            "iou": overlap,
            "hit": int(one.score),
        }
    by_name = groups(rows, found, "split")
    board: list[dict[str, Any]] = [
        {"Split": name, "Precision@1": mean(v), "Average IoU": mean(overlaps[name]) / 100, "Samples": len(v)}
        for name, v in by_name.items()
    ]
    means = {key: sum(record[key] for record in board) / len(board) for key in ("Precision@1", "Average IoU")}
    return values, [*board, {"Split": "Average", **means, "Samples": len(rows)}]


# ---- with a judge ---------------------------------------------------------------------------------------------


def scripted(
    metric: str,
    value: Callable[[Row, Verdict, int], dict[str, Any]],
    aggregate: Callable[[Sequence[Row], Sequence[Verdict]], Any],
) -> Callable[[Cases], Answers]:
    def family(cases: Cases) -> Answers:
        values, found = {}, []
        for case in cases:
            context, script = judged(case)
            [one] = METRICS[metric].verdicts([case["input"]], context)
            found.append(one)
            values[case["id"]] = value(case["input"], one, script.calls)
        return values, aggregate([case["input"] for case in cases], found)

    return family


def mathvista_value(row: Row, one: Verdict, calls: int) -> dict[str, Any]:
    read: Any = one.extracted or ""
    if one.detail == "by rule" and row["question_type"] != "multi_choice":
        read = {"integer": int, "float": float}[row["answer_type"]](read)
    return {"correct": bool(one.score), "judge_calls": calls, "res": read}


def counted(key: str, by_name: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    return [{key: name, "tot": len(v), "hit": sum(v), "acc": mean(v)} for name, v in by_name.items()]


def dynamath_value(row: Row, one: Verdict, calls: int) -> dict[str, Any]:
    read: Any = one.extracted
    if row["answer_type"] == "float" and read is not None:
        read = float(read)
    return {"correct": bool(one.score), "judge_calls": calls, "extracted": read, "parse": read is not None}


def dynamath_board(rows: Sequence[Row], found: Sequence[Verdict]) -> list[dict[str, Any]]:
    def record(name: str, pairs: Sequence[tuple[Row, float]]) -> dict[str, Any]:
        board: dict[str, Any] = {"Setting": name, "Overall": mean(score for _, score in pairs) / 100}
        for column, label in (("subject", "Subject"), ("knowledge_level", "Level")):
            for value in sorted({row[column] for row, _ in pairs}):
                board[f"{label}-{value}"] = mean(score for row, score in pairs if row[column] == value) / 100
        return board

    plain = [(row, one.score) for row, one in zip(rows, found, strict=True)]
    return [record("Average", plain), record("Worst Case", dynamath_worst(rows, found))]


def mathverse(cases: Cases) -> Answers:
    values, found = {}, []
    rows = [{**case["input"], **mapping_literal(case["input"].get("metadata"))} for case in cases]
    for case, row in zip(cases, rows, strict=True):
        context, script = judged(case)
        one = mathverse_compare(row, row["extract"], context)
        found.append(one)
        values[case["id"]] = {"score": bool(one.score), "judge_calls": script.calls}
    board = []
    for name in groups(rows, found, "problem_version"):
        part = [pair for pair in zip(rows, found, strict=True) if pair[0]["problem_version"] == name]
        ours, theirs = [row for row, _ in part], [one for _, one in part]
        record: dict[str, Any] = {"split": name, "Overall": mean(one.score for one in theirs)}
        for column in ("subject", "subfield"):
            record |= {key: mean(v) for key, v in groups(ours, theirs, column).items()}
        board.append(record)
    return values, board


def mathvision_board(rows: Sequence[Row], found: Sequence[Verdict]) -> list[dict[str, Any]]:
    by_name = {"Overall": [one.score for one in found]} | groups(rows, found, "category")
    return counted("Subject", dict(sorted(by_name.items())))


def logicvista_board(rows: Sequence[Row], found: Sequence[Verdict]) -> list[dict[str, Any]]:
    by_name = {"Overall": [one.score for one in found]}
    for name in ("inductive", "deductive", "numerical", "spatial", "mechanical"):
        by_name[name] = [one.score for row, one in zip(rows, found, strict=True) if name in row["skill"]]
    return counted("Task&Skill", by_name)


def mmvet_board(rows: Sequence[Row], found: Sequence[Verdict]) -> list[dict[str, Any]]:
    by_name = mmvet_capabilities(rows, found) | {"Overall": [one.score for one in found]}
    return [{"Category": name, "tot": len(v), "acc": mean(v)} for name, v in by_name.items()]


# ---- the authors' adapter -------------------------------------------------------------------------------------


def postprocess(reply: str) -> dict[str, str]:
    return {
        "cot": sail_answer(reply, "", thinking=True),
        "mmstar_cot": sail_answer(reply, "MMStar", thinking=True),
        "chartqa": sail_answer(reply, "ChartQA_TEST"),
        "chartqa_cot": sail_answer(reply, "ChartQA_TEST", thinking=True),
    }


def prompt(given: Row) -> dict[str, Any]:
    name, kind, row, count = given["dataset"], given["type"], given["line"], given["n_images"]
    own = prompts.has_own_text(name, kind)
    text = None if own else prompts.question_text(name, kind, row)
    pictures = [{"type": "image", "value": "img/0.jpg"}] * count
    return {
        "custom": not own,
        "max_num": prompts.max_tiles(name, kind),
        "message": None if own else [{"type": "text", "value": text}, *pictures],
        "final_prompt": None
        if own
        else prompts.build(name, kind, row, count, thinking=bool(given.get("thinking") or given.get("use_cot"))),
    }


def video_prompt(given: Row) -> dict[str, str]:
    name, message = given["dataset"], given["message"]
    text = "".join(part["value"] for part in message if part["type"] == "text")
    count = sum(part["type"] == "image" for part in message)
    return {"reorganized": prompts.arrange(name, text, count), "video": prompts.arrange_video(name, text, count)}


def tiling(given: Row) -> dict[str, Any]:
    width, height, side = given["width"], given["height"], given["image_size"]
    plain = Tiling(side=side, max_tiles=given["max_num"])
    twice = Tiling(side=side, max_tiles=given["max_num"], msac=True)
    columns, rows = grid(width, height, plain)
    second = grids(width, height, twice)[-1]
    return {
        "ratio": [columns, rows],
        "plain_tiles": num_tiles(width, height, plain),
        "msac1_tiles": num_tiles(width, height, plain),
        "msac2_tiles": second[0] * second[1],
        "msac_total": num_tiles(width, height, twice),
    }


FAMILIES: dict[str, Callable[[Cases], Answers]] = {
    "anls_pair": each(
        lambda given: {
            "anls_distance": anls_distance(given["gt"], given["prediction"]),
            "levenshtein": edit_distance(given["gt"], given["prediction"]),
        }
    ),
    "chartqa": short("chartqa", "relaxed"),
    "chartqa_relaxed_pair": each(lambda given: relaxed(given["prediction"], given["target"])),
    "crpe_line": each(crpe_line),
    "crpe_relation": crpe_relation,
    "docvqa": short("anls", "anls"),
    "dynamath": scripted("dynamath", dynamath_value, dynamath_board),
    "gqa": short("gqa", "equal_mean"),
    "hallusionbench": yes_no("hallusion", hallusion),
    "infovqa": short("anls", "anls"),
    "logicvista": scripted(
        "logicvista",
        lambda row, one, calls: {"hit": int(one.score), "res": one.extracted or "", "judge_calls": calls},
        logicvista_board,
    ),
    "longvideobench": video("longvideobench", "ABCDE", {"duration_group": "", "question_category": ""}),
    "math_is_equal": each(lambda given: math_is_equal(given["prediction"], given["gt"], LATEX)),
    "mathverse_score": mathverse,
    "mathvision": scripted(
        "mathvision",
        lambda row, one, calls: {"correct": bool(one.score), "res": one.extracted or "", "judge_calls": calls},
        mathvision_board,
    ),
    "mathvista": scripted(
        "mathvista",
        mathvista_value,
        lambda rows, found: counted(
            "Task&Skill", {"Overall": [one.score for one in found]} | mathvista_groups(rows, found)
        ),
    ),
    "mcq_first_letter": each(lambda given: real_world(given["prediction"]) or ""),
    "mcq_judge": mcq_judge,
    "mcq_match": each(mcq_match),
    "mcq_vanilla_dataset": hits("mcq"),
    "mmbench_circular": circular,
    "mme": yes_no("mme", mme),
    "mmmu_dataset": hits("mmmu"),
    "mmvet": scripted("mmvet", lambda row, one, calls: {"score": one.score, "judge_calls": calls}, mmvet_board),
    "mvbench": mvbench,
    "ocrbench": ocrbench,
    "ocrvqa": short("ocrvqa", "equal_max"),
    "pope": yes_no("pope", pope),
    "refcoco": refcoco,
    "split_think": each(lambda reply: list(split_think(reply))),
    "tempcompass_caption_matching": tempcompass("caption_matching"),
    "tempcompass_mcq": tempcompass("multi-choice"),
    "tempcompass_yes_no": tempcompass("yes_no"),
    "textvqa": short("vqa", "vqa"),
    "videomme": video("videomme", "ABCD", {"duration": "", "domain": "", "sub_category": "", "task_type": ""}),
    "vqa_default": short("vqa", "vqa"),
    "vqa_normalise": each(lambda text: {"process_punctuation": punct(text), "process_answer": norm(text)}),
    "wemath": wemath,
    "wemath_rule": each(wemath_rule),
    "yorn_extract": each(lambda given: yes_or_no(given["prediction"])),
    "yorn_judge": yorn_judge,
    "sail_postprocess": each(postprocess),
    "sail_prompts": each(prompt),
    "sail_tiling": each(tiling),
    "sail_tiling_448": each(
        lambda given: list(grid(given["width"], given["height"], Tiling(side=448, max_tiles=given["max_num"])))
    ),
    "sail_video_prompt": each(video_prompt),
}


def answer(folder: Path) -> dict[str, Any]:
    """Our answers to every known family of a folder."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        recorded = json.loads(path.read_text(encoding="utf-8"))
        name = recorded.get("family") if isinstance(recorded, dict) else None
        if name not in FAMILIES:
            sys.stderr.write(f"{path.name}: family {name!r} is not known here\n")
            continue
        values, aggregate = FAMILIES[name](recorded["cases"])
        found[name] = {"cases": values}
        if aggregate is not None:
            found[name]["aggregate"] = aggregate
    LATEX.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    asked.out.write_text(json.dumps(answer(asked.folder), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
