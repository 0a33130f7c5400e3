"""Sets whose every answer a judge reads: MathVerse, LogicVista, MMVet. Without one, all are unresolved."""

from __future__ import annotations

from collections.abc import Sequence

from sailvl.eval.scoring import judge_prompts
from sailvl.eval.scoring.base import Context, Metric, Row, Verdict, groups, mean, means, rowwise, verdict
from sailvl.eval.scoring.base import prediction as said
from sailvl.eval.scoring.maths import STEP, TRIES, extracted_answer, question
from sailvl.verify.literal import mapping_literal
from sailvl.verify.structured import letters_match


def _mathverse(row: Row, context: Context) -> Verdict:
    extracted = extracted_answer(row, context)
    if extracted is None:
        return verdict(row, 0.0, None, resolved=False)
    return mathverse_compare(row, extracted, context)


def mathverse_compare(row: Row, extracted: str, context: Context) -> Verdict:
    """An extracted answer against the truth: the same text, else what the judge says."""
    truth = str(row.get("answer"))
    if extracted.strip() == truth.strip():
        return verdict(row, 1.0, extracted, detail="by rule")
    prompt = judge_prompts.same(str(row.get("question_for_eval", question(row))), truth, extracted)
    decided = context.ask(prompt, _zero_or_one, tries=TRIES, step=STEP)
    return verdict(row, decided or 0.0, extracted, resolved=decided is not None, detail="by judge")


def _zero_or_one(reply: str) -> float | None:
    return {"0": 0.0, "1": 1.0}.get(reply.strip())


def _mathverse_total(
    rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context
) -> tuple[float, dict[str, float]]:
    scores = means(rows, verdicts, "problem_version")
    metadata = [mapping_literal(row.get("metadata")) for row in rows]
    return mean(one.score for one in verdicts), scores | means(metadata, verdicts, "subject", "subfield")


def _logicvista(row: Row, context: Context) -> Verdict:
    prompt = judge_prompts.letters(question(row), said(row, context))
    found = context.ask(prompt, lambda reply: reply if _capitals(reply) else None, tries=TRIES, step=STEP)
    right = found is not None and letters_match(found, str(row.get("answer")))
    return verdict(row, float(right), found, resolved=found is not None)


def _capitals(reply: str) -> bool:
    return reply.isupper() and reply.isalpha()


SKILLS = ("inductive", "deductive", "numerical", "spatial", "mechanical")


def _logicvista_total(
    rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context
) -> tuple[float, dict[str, float]]:
    pairs = [(str(row.get("skill")), one.score) for row, one in zip(rows, verdicts, strict=True)]
    by_skill = {name: [score for skill, score in pairs if name in skill] for name in SKILLS}
    return mean(one.score for one in verdicts), {
        f"skill/{name}": mean(found) for name, found in by_skill.items() if found
    }


def _mmvet(row: Row, context: Context) -> Verdict:
    prompt = judge_prompts.grade(question(row), str(row.get("answer")), said(row, context))
    grade = context.ask(prompt, _share, tries=TRIES, step=STEP)
    return verdict(row, grade or 0.0, None if grade is None else str(grade), resolved=grade is not None)


def _share(reply: str) -> float | None:
    try:
        found = float(reply)
    except ValueError:
        return None
    return found if 0 <= found <= 1 else None


CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def mmvet_capabilities(
    rows: Sequence[Row], verdicts: Sequence[Verdict], *, strict: bool = False
) -> dict[str, list[float]]:
    """Grades by capability. One that a question asks for alone counts twice, as published; not so if ``strict``."""
    found: dict[str, list[float]] = {name: [] for name in CAPABILITIES}
    for row, one in zip(rows, verdicts, strict=True):
        category = str(row.get("category"))
        for name in CAPABILITIES:
            if name in category:
                found[name] += [one.score] * (2 if category == name and not strict else 1)
    return {name: grades for name, grades in found.items() if grades}


def _mmvet_total(rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context) -> tuple[float, dict[str, float]]:
    by_name = mmvet_capabilities(rows, verdicts, strict=context.strict)
    scores = {f"capability/{name}": mean(grades) for name, grades in by_name.items()}
    mixed = {
        f"together/{name}": mean(grades) for name, grades in groups(rows, verdicts, "category").items() if "," in name
    }
    return mean(one.score for one in verdicts), scores | mixed


GRADED: dict[str, Metric] = {
    "mathverse": Metric(verdicts=rowwise(_mathverse), total=_mathverse_total, needs=("answer",), judged=True),
    "logicvista": Metric(verdicts=rowwise(_logicvista), total=_logicvista_total, needs=("answer",), judged=True),
    "mmvet": Metric(verdicts=rowwise(_mmvet), total=_mmvet_total, needs=("answer",), judged=True),
}
