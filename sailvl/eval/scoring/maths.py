"""Mathematics: MathVista, MathVision, DynaMath, OlympiadBench.

Most replies here are solutions in free words, so a judge takes the answer out before a rule compares it; without one,
only what a rule can read by itself is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from sailvl.eval.scoring import judge_prompts
from sailvl.eval.scoring.base import (
    Context,
    Metric,
    Row,
    Verdict,
    mean,
    means,
    missing,
    plain,
    rowwise,
    verdict,
)
from sailvl.eval.scoring.base import prediction as said
from sailvl.verify.literal import answers, list_literal
from sailvl.verify.math_equal import math_is_equal
from sailvl.verify.olympiad import final_part, olympiad_right, precisions
from sailvl.verify.options import infer
from sailvl.verify.structured import (
    dynamath_right,
    json_part,
    mathvista_value,
    same_value,
    short_answer,
    typed,
)

TRIES = 5
STEP = 0.5


def _choices(row: Row) -> dict[str, str]:
    return dict(zip(ascii_uppercase, map(str, list_literal(row.get("choices")) or ()), strict=False))


def question(row: Row) -> str:
    """The question of a row, or nothing."""
    return str(row.get("question", ""))


def extracted_answer(row: Row, context: Context) -> str | None:
    """The answer as the judge copies it out; None if there is no judge or it fails."""
    return context.ask(judge_prompts.extract(question(row), said(row, context)), str, tries=TRIES, step=STEP)


# ---- MathVista ------------------------------------------------------------------------------------------------


def _mathvista_reads(row: Row, reply: object, context: Context) -> tuple[object, bool]:
    """(what a reply was read as, None if it could not be; whether that is right)."""
    kind, truth = str(row.get("answer_type")), row.get("answer")
    if row.get("question_type") == "multi_choice":
        found: object = infer(str(reply), _choices(row), strict=context.strict)
        return found, found is not None and found == str(row.get("answer_option"))
    found = mathvista_value(reply, kind)
    if found is not None or kind in ("integer", "float") or not context.strict:
        return found, found is not None and found == mathvista_value(truth, kind)
    right = same_value(str(reply), str(truth))
    return (str(reply) if right else None), right


def _mathvista(row: Row, context: Context) -> Verdict:
    """A choice that can be read stands; a number only if it is right, and 0 never: the rest goes to the judge.

    Text and lists are never right, as published; ``strict`` compares them, and lets a 0 stand.
    """
    cell = row.get("prediction")
    found, right = _mathvista_reads(row, said(row, context) if missing(cell) else cell, context)
    is_choice = row.get("question_type") == "multi_choice"
    if found is not None and (is_choice or (right and (found != 0 or context.strict))):
        return verdict(row, float(right), str(found), detail="by rule")
    reply = extracted_answer(row, context)
    if reply is None:
        return verdict(row, 0.0, None, resolved=False)
    return verdict(row, float(_mathvista_reads(row, reply, context)[1]), reply, detail="by judge")


def _skills(row: Row) -> list[str]:
    return [] if missing(row.get("skills")) else answers(row["skills"])


def mathvista_groups(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> dict[str, list[float]]:
    """Scores by task and by skill; a row with several skills is in each."""
    found: dict[str, list[float]] = {}
    for row, one in zip(rows, verdicts, strict=True):
        for name in (*_skills(row), *([] if missing(row.get("task")) else [str(row["task"])])):
            found.setdefault(name, []).append(one.score)
    return found


def _mathvista_total(
    rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context
) -> tuple[float, dict[str, float]]:
    by_name = sorted(mathvista_groups(rows, verdicts).items())
    return mean(one.score for one in verdicts), {f"task or skill/{name}": mean(scores) for name, scores in by_name}


# ---- MathVision -----------------------------------------------------------------------------------------------


def _mathvision(row: Row, context: Context) -> Verdict:
    choices, truth, reply = _choices(row), str(row.get("answer")), said(row, context)
    if choices:
        found = infer(reply, choices, strict=context.strict)
        if found is not None:
            return verdict(row, float(_equal(found, truth, context)), found, detail="by rule")
    elif _equal(reply, truth, context) and (reply or context.strict):
        return verdict(row, 1.0, reply, detail="by rule")
    extracted = extracted_answer(row, context)
    if extracted is None:
        return verdict(row, 0.0, None, resolved=False)
    named = (infer(extracted, choices, strict=context.strict) or "False") if choices else extracted
    return verdict(row, float(_equal(named, truth, context)), extracted, detail="by judge")


def _equal(answer: str, truth: str, context: Context) -> bool:
    return math_is_equal(answer, truth, context.latex, strict=context.strict)


# ---- DynaMath -------------------------------------------------------------------------------------------------


def _dynamath(row: Row, context: Context) -> Verdict:
    kind, part = str(row.get("answer_type")), json_part(said(row, context))
    answer = short_answer(part)
    given = typed(answer, kind)
    resolved, read = True, ""
    if given is None and (answer is None or kind in ("float", "multiple choice")):
        given = typed(part, kind)
        if given is None:
            reply = context.ask(judge_prompts.short(kind, part), str, tries=1)
            given, resolved, read = typed(reply, kind), reply is not None, "by judge"
    right = dynamath_right(given, row.get("answer"), kind, part, strict=context.strict)
    extracted = None if given is None else str(given)
    return verdict(row, float(right), extracted, resolved=resolved or right, detail=read if resolved else "")


def dynamath_worst(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> list[tuple[Row, float]]:
    """A question's first row, and 1 if all its variants are right."""
    found: dict[str, tuple[Row, float]] = {}
    for row, one in zip(rows, verdicts, strict=True):
        name = str(row.get("qid"))
        first, score = found.get(name, (row, 1.0))
        found[name] = (first, min(score, one.score))
    return list(found.values())


def _dynamath_total(
    rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context
) -> tuple[float, dict[str, float]]:
    """The worst case over a question's variants is what the technical report gives; the average stands beside."""
    worst = dynamath_worst(rows, verdicts)
    scores = {"average": mean(one.score for one in verdicts)}
    scores |= {f"average/{name}": value for name, value in means(rows, verdicts, "subject", "knowledge_level").items()}
    for column in ("subject", "knowledge_level"):
        for name in sorted({str(row.get(column)) for row, _ in worst if not missing(row.get(column))}):
            scores[f"worst/{column}/{name}"] = mean(score for row, score in worst if str(row.get(column)) == name)
    return mean(score for _, score in worst), scores


# ---- OlympiadBench --------------------------------------------------------------------------------------------


def _olympiad(row: Row, context: Context) -> Verdict:
    chinese = "zh" in str(row.get("source", ""))
    answer = final_part(said(row, context), chinese=chinese)
    truth = str(row.get("final_answer"))[2:-2]
    within = precisions(None if "Tuple" in str(row.get("answer_type")) else row.get("error"))
    return verdict(row, float(olympiad_right(answer, truth, context.latex, within)), answer)


def _olympiad_total(
    rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context
) -> tuple[float, dict[str, float]]:
    scores = means(rows, verdicts, "source")
    pairs = [(str(row.get("source", "")), one.score) for row, one in zip(rows, verdicts, strict=True)]
    for wanted in (("maths",), ("physics",), ("en", "maths"), ("en", "physics"), ("zh", "maths"), ("zh", "physics")):
        found = [score for source, score in pairs if set(wanted) <= set(source.split("_"))]
        if found:
            scores["_".join(wanted)] = mean(found)
    return mean(one.score for one in verdicts), scores


MATHS: dict[str, Metric] = {
    "mathvista": Metric(verdicts=rowwise(_mathvista), total=_mathvista_total, needs=("answer_type",), judged=True),
    "mathvision": Metric(verdicts=rowwise(_mathvision), total=plain("category"), needs=("answer",), judged=True),
    "dynamath": Metric(verdicts=rowwise(_dynamath), total=_dynamath_total, needs=("answer", "answer_type", "qid")),
    "olympiad": Metric(verdicts=rowwise(_olympiad), total=_olympiad_total, needs=("final_answer",)),
}
