"""Multiple choice over clips, and MME-RealWorld, whose rule is a clip set's: the first capital letter in the reply."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from string import ascii_uppercase

from sailvl.eval.scoring import judge_prompts
from sailvl.eval.scoring.base import Context, Metric, Row, Verdict, mean, means, missing, plain, rowwise, verdict
from sailvl.eval.scoring.base import options as row_options
from sailvl.eval.scoring.base import prediction as said
from sailvl.eval.scoring.choices import taken
from sailvl.verify.literal import answers, list_literal
from sailvl.verify.options import first_capital, first_word_matches, question_options, real_world, strict_option
from sailvl.verify.structured import tempcompass_choice, tempcompass_matching
from sailvl.verify.yesno import begins


def _video(row: Row, context: Context, *, letters: str) -> Verdict:
    reply = said(row, context)
    choices = row_options(row) | question_options(str(row.get("question", "")))
    found = strict_option(reply, choices or letters) if context.strict else None
    found = found or first_capital(reply, letters) or taken(row, choices, context)
    return verdict(row, float(found == _video_truth(row)), found, resolved=found is not None)


def _video_truth(row: Row) -> str:
    """The true letter: ``correct_choice`` counts from 0 (LongVideoBench), ``answer`` is a letter (Video-MME)."""
    place = row.get("correct_choice")
    if missing(place):
        return str(row.get("answer"))
    try:
        return ascii_uppercase[int(float(str(place)))]
    except (ValueError, IndexError, OverflowError):
        raise ValueError(f"row {row.get('index')!r}: correct_choice is {place!r}, not the place of an option") from None


def _thousandths(
    rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context, *, columns: tuple[str, ...]
) -> tuple[float, dict[str, float]]:
    """Published as a fraction with three decimals, which is how it is given here; "exact" is not rounded."""
    exact = mean(one.score for one in verdicts)
    return float(f"{exact / 100:.3f}") * 100, {"exact": exact} | means(rows, verdicts, *columns)


def _real_world(row: Row, context: Context) -> Verdict:
    reply = said(row, context)
    if context.strict:
        found = strict_option(reply, "ABCDE") or (real_world(reply) if reply.strip() else None)
    else:
        found = real_world(reply)
    return verdict(row, float(found == str(row.get("answer"))), found)


def _mvbench(row: Row, context: Context) -> Verdict:
    """A missing prediction is wrong; VLMEvalKit counts it as right, because its score is no number."""
    listed = list_literal(row.get("candidates"))
    choices = row_options(row) if listed is None else dict(zip(ascii_uppercase, map(str, listed), strict=False))
    truth = str(row.get("answer"))
    letter = next((name for name, option in reversed(choices.items()) if option == truth), "")
    if not letter and truth in choices:
        letter = truth
    if not letter:
        return verdict(row, 0.0, None, detail="the truth is not among the options")
    reply = said(row, context)
    blank = context.strict and not reply.strip(" .\n\t")
    if missing(row.get("prediction")) or "Failed to obtain answer" in reply or blank:
        return verdict(row, 0.0, None)
    if first_word_matches(reply, letter):
        return verdict(row, 1.0, letter)
    found = taken(row, choices, context)
    return verdict(row, float(found == letter), found, resolved=found is not None)


def tempcompass_kind(row: Row) -> str:
    """Which of TempCompass's tasks a row belongs to, by ``task_type``, else by its cells."""
    kind = str(row.get("task_type") or "").lower().replace("-", "_")
    for name in ("captioning", "caption_matching", "multi_choice", "yes_no"):
        if name in kind:
            return name
    if str(row.get("answer")).lower() in ("yes", "no"):
        return "yes_no"
    return "caption_matching" if list_literal(row.get("candidates")) else "multi_choice"


_TEMPCOMPASS = {
    "multi_choice": "multiple-choice question about a video",
    "caption_matching": "question which caption fits a video",
    "yes_no": "yes/no question about a video",
}


def _rated(reply: str) -> float | None:
    """1 or 0 from "Correct" and "Incorrect", the first word first; None if the judge said neither."""
    if "Correct" not in reply and "Incorrect" not in reply:
        return None
    return float(reply.startswith("Correct") or ("Correct" in reply and "Incorrect" not in reply))


def _tempcompass(row: Row, context: Context) -> Verdict:
    kind, reply, truth = tempcompass_kind(row), said(row, context), str(row.get("answer"))
    question = str(row.get("question", ""))
    if kind == "captioning":
        truth = str(row.get("mc_answer"))
        prompt = judge_prompts.caption(str(row.get("mc_question", "")), reply)
        named = context.ask(prompt, lambda text: text or None, tries=1)
        right = named is not None and _captioned(named, truth)
        return verdict(row, float(right), named, resolved=named is not None)
    if kind == "yes_no":
        found = begins(reply)
        rating = None if found == "Unknown" else float(found.lower() == truth.lower())
    elif kind == "caption_matching":
        rating = tempcompass_matching(reply, truth, answers(row.get("candidates")))
    else:
        rating = tempcompass_choice(reply, truth)
    if rating is None:
        prompt = judge_prompts.correct(_TEMPCOMPASS[kind], question, truth, reply)
        judged = context.ask(prompt, _rated, tries=1)
        return verdict(row, judged or 0.0, None, resolved=judged is not None, detail="judged" if context.judge else "")
    return verdict(row, float(rating), reply)


def _captioned(reply: str, truth: str) -> bool:
    """Whether the judge's line "Answer: B. text" names the truth's letter, and only one letter."""
    lines = [line.strip().replace("Answer:", "").strip() for line in reply.split("\n") if "Answer" in line]
    named = lines[-1] if lines else reply
    return named.split(". ")[0] == truth.split(". ")[0] and sum(named.count(f"{letter}.") for letter in "ABCD") == 1


CLIPS: dict[str, Metric] = {
    "videomme": Metric(
        verdicts=rowwise(partial(_video, letters="ABCD")),
        total=partial(_thousandths, columns=("duration", "domain", "sub_category", "task_type")),
        needs=("answer",),
    ),
    "longvideobench": Metric(
        verdicts=rowwise(partial(_video, letters="ABCDE")),
        total=partial(_thousandths, columns=("duration_group", "question_category")),
    ),
    "mme_realworld": Metric(verdicts=rowwise(_real_world), total=plain("category", "l2-category"), needs=("answer",)),
    "mvbench": Metric(verdicts=rowwise(_mvbench), total=plain("task_type"), needs=("answer",)),
    "tempcompass": Metric(verdicts=rowwise(_tempcompass), total=plain("dim", "task_type")),
}
