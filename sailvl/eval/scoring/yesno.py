"""Yes/no sets: MME, HallusionBench, POPE, and any other. What holds neither word, or both, goes to the judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sailvl.eval.scoring import judge_prompts
from sailvl.eval.scoring.base import Context, Metric, Row, Verdict, mean, missing, plain, rowwise, verdict
from sailvl.eval.scoring.base import prediction as said
from sailvl.verify.yesno import yes_or_no

TRIES = 5

PERCEPTION = ("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene")
REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")


def _yes_or_no(row: Row, context: Context) -> Verdict:
    reply = said(row, context)
    found: str = yes_or_no(reply, strict=context.strict)
    if found == "Unknown" and context.judge is not None:
        prompt = judge_prompts.yes_or_no(str(row.get("question", "")), reply)
        found = context.ask(prompt, _word, tries=TRIES, step=0.5) or found
    return verdict(row, float(found == str(row.get("answer")).capitalize()), found, resolved=found != "Unknown")


def _word(reply: str) -> str | None:
    found = yes_or_no(reply)
    return None if found == "Unknown" else found


# ---- MME ------------------------------------------------------------------------------------------------------


def mme_categories(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Points of each category, 0 to 200: percent of questions right plus percent of pictures with both right."""
    pictures: dict[str, dict[str, list[float]]] = {}
    for row, one in zip(rows, verdicts, strict=True):
        name = str(row.get("category"))
        pictures.setdefault(name, {}).setdefault(str(row.get("image_path")), []).append(one.score)
    return {
        name: mean(score for scores in found.values() for score in scores)
        + mean(math.prod(scores[:2]) for scores in found.values())
        for name, found in pictures.items()
    }


def _mme(rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context) -> tuple[float, dict[str, float]]:
    """The sum of ten perception and four reasoning categories, over 28: 2800 points are 100 %."""
    points = mme_categories(rows, verdicts)
    sums = {
        "perception (of 2000)": sum(points.get(name, 0.0) for name in PERCEPTION),
        "reasoning (of 800)": sum(points.get(name, 0.0) for name in REASONING),
    }
    named = {f"category/{name} (of 200)": value for name, value in sorted(points.items())}
    return sum(sums.values()) / 28, sums | {"accuracy": mean(one.score for one in verdicts)} | named


# ---- HallusionBench -------------------------------------------------------------------------------------------


def hallusion_rates(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """aAcc, fAcc, qAcc in percent: questions right, figures with all their questions right, questions with all figures.

    Fields 3, 4 and 5 of the index are set, figure and question. Raises ValueError for another kind of index.
    """
    by_figure: dict[tuple[str, str, str], bool] = {}
    by_question: dict[tuple[str, str, str], bool] = {}
    for row, one in zip(rows, verdicts, strict=True):
        fields = str(row.get("index")).split("_")
        if len(fields) < 6:
            raise ValueError(f"row {row.get('index')!r}: the index must have six parts, VD_figure_0_1_2_0 for example")
        kind = str(row.get("l2-category"))
        for found, key in ((by_figure, (kind, fields[3], fields[4])), (by_question, (kind, fields[3], fields[5]))):
            found[key] = found.get(key, True) and one.score == 1
    return {
        "aAcc": mean(one.score for one in verdicts),
        "fAcc": mean(map(float, by_figure.values())),
        "qAcc": mean(map(float, by_question.values())),
    }


def _hallusion(rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context) -> tuple[float, dict[str, float]]:
    scores = hallusion_rates(rows, verdicts)
    main = sum(scores.values()) / 3
    for column in ("category", "l2-category"):
        for name in sorted({str(row[column]) for row in rows if not missing(row.get(column))}):
            part = [pair for pair in zip(rows, verdicts, strict=True) if str(pair[0].get(column)) == name]
            rates = hallusion_rates([row for row, _ in part], [one for _, one in part])
            scores |= {f"{column}/{name}/{rate}": value for rate, value in rates.items()}
    return main, scores


# ---- POPE -----------------------------------------------------------------------------------------------------


def pope_rates(pairs: Sequence[tuple[str, Verdict]]) -> dict[str, float]:
    """F1, precision and recall of "Yes" and accuracy, in percent, from (truth, verdict); Unknown is not yes."""
    yes = [(truth == "Yes", one.extracted == "Yes") for truth, one in pairs]
    both = sum(wanted and given for wanted, given in yes)
    precision = both / max(sum(given for _, given in yes), 1)
    recall = both / max(sum(wanted for wanted, _ in yes), 1)
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    accuracy = mean(one.score for _, one in pairs)
    return {"F1": 100 * f1, "precision": 100 * precision, "recall": 100 * recall, "accuracy": accuracy}


def pope_categories(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """Rates overall (under "") and by category; a row in several counts once in each, and as often overall."""
    by_name: dict[str, list[tuple[str, Verdict]]] = {}
    overall = []
    for row, one in zip(rows, verdicts, strict=True):
        cell = row.get("category")
        for name in [""] if missing(cell) else str(cell).split(","):
            overall.append((str(row.get("answer")).capitalize(), one))
            if name:
                by_name.setdefault(name, []).append((str(row.get("answer")).capitalize(), one))
    return {"": pope_rates(overall)} | {name: pope_rates(pairs) for name, pairs in sorted(by_name.items())}


def _pope(rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context) -> tuple[float, dict[str, float]]:
    found: Mapping[str, dict[str, float]] = pope_categories(rows, verdicts)
    scores = {
        f"category/{name}/{rate}" if name else rate: value
        for name, rates in found.items()
        for rate, value in rates.items()
    }
    return scores["F1"], scores


YES_NO: dict[str, Metric] = {
    "yes_no": Metric(verdicts=rowwise(_yes_or_no), total=plain("category", "l2-category"), needs=("answer",)),
    "mme": Metric(verdicts=rowwise(_yes_or_no), total=_mme, needs=("answer", "category", "image_path")),
    "hallusion": Metric(verdicts=rowwise(_yes_or_no), total=_hallusion, needs=("answer", "index")),
    "pope": Metric(verdicts=rowwise(_yes_or_no), total=_pope, needs=("answer",)),
}
