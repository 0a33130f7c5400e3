"""Multiple choice: pictures, rotated options, clips, and the sets whose options stand in the question.

An option is read from the reply by rule; a reply that no rule can read goes to the judge, three times at most; without
a judge, or if it fails as well, the answer is unresolved and wrong. (VLMEvalKit draws an option at random there.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from sailvl.eval.scoring import judge_prompts
from sailvl.eval.scoring.base import Context, Metric, Row, Verdict, mean, means, missing, plain, rowwise, verdict
from sailvl.eval.scoring.base import options as row_options
from sailvl.eval.scoring.base import prediction as said
from sailvl.verify.options import infer
from sailvl.verify.structured import crpe_right, wemath_letter

TRIES = 3


def taken(row: Row, choices: Mapping[str, str], context: Context) -> str | None:
    """The option a row's prediction takes, by rule, else by the judge; None if neither can tell."""
    reply = said(row, context)
    found = infer(reply, choices, strict=context.strict)
    if found is None and context.judge is not None:
        prompt = judge_prompts.option(str(row.get("question", "")), choices, reply)
        found = context.ask(prompt, lambda answer: infer(answer, choices, strict=context.strict), tries=TRIES)
    return found


def _decided(row: Row, choices: Mapping[str, str], truth: str, context: Context) -> Verdict:
    found = taken(row, choices, context)
    return verdict(row, float(found == truth), found, resolved=found is not None)


def _mcq(row: Row, context: Context) -> Verdict:
    return _decided(row, row_options(row), str(row.get("answer")), context)


def mmmu_row(row: Row) -> tuple[dict[str, str], str]:
    """Options and true letter of an MMMU row: an open question has its answer as A and "Other Answers" as B."""
    choices = row_options(row)
    if "A" not in choices:
        choices = {"A": str(row.get("answer")), **choices, "B": "Other Answers"}
        if missing(row.get("answer")):
            del choices["A"]
    truth = str(row.get("answer"))
    return choices, truth if len(truth) == 1 and truth in ascii_uppercase else "A"


def _mmmu(row: Row, context: Context) -> Verdict:
    return _decided(row, *mmmu_row(row), context)


def _mmmu_total(rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context) -> tuple[float, dict[str, float]]:
    """The validation split is what people report; a file without it counts as a whole."""
    scores = means(rows, verdicts, "split", "l2-category", "category")
    main = scores.get("split/validation", mean(one.score for one in verdicts))
    part = [pair for pair in zip(rows, verdicts, strict=True) if pair[0].get("split") == "validation"]
    if part and len(part) < len(rows):
        ours, theirs = [row for row, _ in part], [one for _, one in part]
        inside = means(ours, theirs, "l2-category", "category")
        scores |= {f"validation/{name}": value for name, value in inside.items()}
    return main, scores


# ---- rotated options ------------------------------------------------------------------------------------------


def rotations(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that ask one question with rotated options, groups and rows in the file's order.

    A group is the column ``g_index``, else the index modulo a million. Raises ValueError for an index that is no
    whole number.
    """
    found: dict[int, list[Row]] = {}
    for row in rows:
        name = row.get("g_index")
        try:
            group = int(str(row["index"]).removesuffix(".0")) % 1_000_000 if missing(name) else int(float(str(name)))
        except (KeyError, ValueError):
            raise ValueError(f"row {row.get('index')!r}: rotated options need indices that are whole numbers") from None
        found.setdefault(group, []).append(row)
    return list(found.values())


def _rotated(group: Sequence[Row], context: Context) -> Verdict:
    """Right if every rotation is; the judge is asked only if the rules find no wrong one, and only until it does."""
    choices = [row_options(row) for row in group]
    truths = [str(row.get("answer")) for row in group]
    read = [
        infer(said(row, context), options, strict=context.strict) for row, options in zip(group, choices, strict=True)
    ]
    first = group[0]
    if any(found is not None and found != truth for found, truth in zip(read, truths, strict=True)):
        return verdict(first, 0.0, " ".join(found or "?" for found in read))
    for place, found in enumerate(read):
        if found is None:
            read[place] = taken(group[place], choices[place], context) if context.judge is not None else None
            if read[place] != truths[place]:
                break
    right = read == truths
    known = right or any(found is not None and found != truth for found, truth in zip(read, truths, strict=True))
    return verdict(first, float(right), " ".join(found or "?" for found in read), resolved=known)


def _circular(rows: Sequence[Row], context: Context) -> list[Verdict]:
    return context.each(lambda group: _rotated(group, context), rotations(rows))


def _circular_total(
    rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context
) -> tuple[float, dict[str, float]]:
    firsts = [group[0] for group in rotations(rows)]
    alone = [
        max(
            one.score,
            float(infer(said(row, context), row_options(row), strict=context.strict) == str(row.get("answer"))),
        )
        for row, one in zip(firsts, verdicts, strict=True)
    ]
    scores = {"first rotation alone": mean(alone)} | means(firsts, verdicts, "split", "l2-category", "category")
    return mean(one.score for one in verdicts), scores


# ---- CRPE, WeMath ---------------------------------------------------------------------------------------------


def _crpe(row: Row, context: Context) -> Verdict:
    reply, truth = said(row, context), str(row.get("answer"))
    if not context.strict:
        return verdict(row, float(crpe_right(reply, truth)), reply[:1])
    choices = row_options(row) or _lettered_lines(str(row.get("question", "")))
    found = infer(reply, choices or dict.fromkeys("ABCD", "\0"), strict=True) if reply.strip(" .\n\t") else None
    return verdict(row, float(found == truth.strip("( ")[:1]), found)


def _lettered_lines(question: str) -> dict[str, str]:
    """Options that stand on lines of their own: ``A. ..`` or ``(A) ..``."""
    lines = [line.strip() for line in question.split("\n")]
    return {
        letter: line.removeprefix(mark).strip(". ")
        for line in lines
        for letter in "ABCD"
        for mark in (f"{letter}.", f"({letter})")
        if line.startswith(mark)
    }


def crpe_groups(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> dict[str, list[float]]:
    """Scores of every four rows in a row, all of which must be right, by the category of the first wrong or last."""
    found: dict[str, list[float]] = {"total": []}
    pairs = list(zip(rows, verdicts, strict=True))
    for start in range(0, len(pairs), 4):
        part = pairs[start : start + 4]
        wrong = next((row for row, one in part if one.score < 1), None)
        name = str((wrong or part[-1][0]).get("category"))
        found.setdefault(name, []).append(float(wrong is None))
        found["total"].append(float(wrong is None))
    return found


def _crpe_total(rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context) -> tuple[float, dict[str, float]]:
    """Groups of four are what VLMEvalKit prints; the technical report's figure fits single questions."""
    groups = crpe_groups(rows, verdicts)
    scores = {"by question": mean(one.score for one in verdicts)}
    scores |= {f"category/{name}": mean(values) for name, values in groups.items() if name != "total"}
    return mean(groups["total"]), scores


def _wemath(row: Row, context: Context) -> Verdict:
    truth, choices = str(row.get("answer")), row_options(row)
    if choices and (context.judge is not None or context.strict):
        return _decided(row, choices, truth, context)
    found = wemath_letter(said(row, context))
    return verdict(row, float(found == truth), found, resolved=found is not None)


WEMATH_PROBLEMS = 525
"""Problems of several steps in the whole benchmark: what its score is a share of."""


def wemath_counts(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many problems of two or three steps were mastered, half understood, learnt by rote or not known.

    "present" is how many have a first step and a combination in the file; others count for nothing. IG: only the
    combination wrong; IK: it and a step wrong; CM: mastered; RM: the combination right, a step (loose: all) wrong.
    """
    parts: dict[tuple[str, str], dict[str, bool]] = {}
    for row, one in zip(rows, verdicts, strict=True):
        steps, _, part = str(row.get("key", "")).partition("_")
        name = row.get("ID", row.get("id"))
        parts.setdefault((steps, str(name)), {})[part] = one.score == 1
    names = ("present", "IG", "IK", "CM strict", "CM loose", "RM strict", "RM loose")
    counts = dict.fromkeys(names, 0)
    for (steps, _), found in parts.items():
        number = {"2steps": 2, "3steps": 3}.get(steps, 0)
        if not number or "1" not in found or "multi" not in found:
            continue
        known = [found.get(str(step + 1)) for step in range(number)]
        counts["present"] += 1
        if found["multi"]:
            counts["CM strict"] += all(known)
            counts["CM loose"] += any(known)
            counts["RM strict"] += False in known
            counts["RM loose"] += known.count(False) == number
        else:
            counts["IG"] += all(known)
            counts["IK"] += False in known
    return counts


def _wemath_total(rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context) -> tuple[float, dict[str, float]]:
    """A problem that is not in the file counts as mastered, as published; strict scoring counts what is there."""
    counts = wemath_counts(rows, verdicts)
    whole = counts["present"] if context.strict else WEMATH_PROBLEMS
    scores = {name: float(count) for name, count in counts.items()}
    lost = 0.5 * counts["IG"] + counts["IK"]
    for kind in ("strict", "loose"):
        scores[kind] = 100 * (whole - lost - counts[f"RM {kind}"]) / whole if whole else 0.0
    return scores["strict"], scores | {"accuracy": mean(one.score for one in verdicts)}


CHOICES: dict[str, Metric] = {
    "mcq": Metric(verdicts=rowwise(_mcq), total=plain("split", "l2-category", "category"), needs=("answer",)),
    "mmmu": Metric(verdicts=rowwise(_mmmu), total=_mmmu_total, needs=("answer",)),
    "circular": Metric(verdicts=_circular, total=_circular_total, needs=("answer", "index")),
    "crpe": Metric(verdicts=rowwise(_crpe), total=_crpe_total, needs=("answer",)),
    "wemath": Metric(verdicts=rowwise(_wemath), total=_wemath_total, needs=("answer", "key")),
}
