"""Scores of public benchmarks from a file of predictions, comparable with the published ones.

A metric is a name; ``score`` gives the figure people report and everything it is made of. The rules are those of
VLMEvalKit, with which the technical report (arXiv 2509.14033) was scored, re-implemented: the same answers get the
same verdicts, case by case, flaws included. Three things are different on purpose: an answer that no rule and no judge
can read is wrong instead of drawn at random, nothing that a model said is ever run as code, and no reply stops the
scoring. ``DIFFERENCES`` lists where that shows.

``strict=True`` repairs the published rules' flaws. Figures obtained so compare with each other and with nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from sailvl.eval.scoring.base import Context, Judge, JudgeError, Metric, Row, Scored, Verdict, missing
from sailvl.eval.scoring.choices import CHOICES
from sailvl.eval.scoring.clips import CLIPS
from sailvl.eval.scoring.graded import GRADED
from sailvl.eval.scoring.judge_prompts import VERSION as JUDGE_PROMPTS
from sailvl.eval.scoring.maths import MATHS
from sailvl.eval.scoring.vqa import VQA
from sailvl.eval.scoring.yesno import YES_NO

__all__ = [
    "DIFFERENCES",
    "JUDGE_PROMPTS",
    "METRICS",
    "Judge",
    "JudgeError",
    "Row",
    "Scored",
    "Verdict",
    "score",
]

METRICS: dict[str, Metric] = {**CHOICES, **CLIPS, **YES_NO, **VQA, **MATHS, **GRADED}
"""Every metric by its name.

mcq (MMStar, AI2D, RealWorldQA, SEED, BLINK, MUIR, ScienceQA, MMIU), mmmu, circular (MMBench v1.1), videomme,
longvideobench, mme_realworld, mvbench, tempcompass, crpe, wemath; yes_no, mme, hallusion, pope; anls (DocVQA, InfoVQA),
chartqa, vqa (TextVQA, VizWiz and others), ocrvqa, gqa, vqa_exact, ocrbench, refcoco; mathvista, mathvision, mathverse,
dynamath, logicvista, olympiad, mmvet.
"""

DIFFERENCES: dict[str, str] = {
    "judge fails": "the option is not drawn at random; the answer is unresolved and wrong",
    "no judge": "MathVista, MathVision, MathVerse, LogicVista, MMVet are scored by rule as far as it goes, not refused",
    "crpe, empty reply": "wrong; upstream stops",
    "dynamath, text that is not text": "wrong; upstream stops",
    "dynamath, digits such as ² that are no number": "go to the judge; upstream stops",
    "list of answers with numbers in it": "the numbers are compared as text; upstream stops",
    "ocrbench, answer that is no list": "one answer; upstream stops, or takes its letters one by one",
    "mathvision, answers and options": "literals and arithmetic only: calls and comparisons are not run",
    "mathvision, slow formulas": "unequal after 5 s or 1,000 characters; upstream waits 30 s",
    "mvbench, missing or failed prediction": "wrong; upstream counts it as right",
    "mvbench, truth that is no option": "wrong, with a note",
    "tempcompass, candidates without ': '": "only what can be compared is; upstream stops",
    "mme, a picture with one question": "counts with that one; upstream stops",
    "mme, a category that is missing": "adds nothing; upstream stops",
    "crpe, rows no multiple of four": "the last group is what is left; upstream stops",
    "circular, a group without its first rotation": "counts; upstream leaves it out",
    "wemath, empty reply": "wrong; upstream stops",
    "wemath, no combined problem right": "scored; upstream divides by zero",
    "olympiad": "our reading of the benchmark's rule; no recorded verdicts to compare with",
}
"""Where verdicts may differ from VLMEvalKit's on purpose, and how."""


def score(
    metric: str,
    rows: Sequence[Row],
    *,
    judge: Judge | None = None,
    strict: bool = False,
    workers: int = 8,
) -> Scored:
    """Score a set: ``rows`` are its samples with their ``prediction`` (text, or None for no answer).

    ``judge`` is asked in ``workers`` threads, and only where rules fail. Raises ValueError for an unknown metric, for
    no rows, and for rows without the columns a metric needs; LatexMissing if formulas cannot be compared.
    """
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; there are {', '.join(sorted(METRICS))}")
    if not rows:
        raise ValueError(f"{metric}: no rows to score")
    rule = METRICS[metric]
    for column in (*rule.needs, "prediction"):
        if column == "prediction":
            if not any(column in row for row in rows):
                raise ValueError(f"{metric}: none of the {len(rows)} rows has the column prediction")
        elif all(missing(row.get(column)) for row in rows):
            raise ValueError(
                f"{metric}: none of the {len(rows)} rows has a value in the column {column!r}, so this set cannot be "
                "scored here"
            )
    context = Context(judge=judge, strict=strict, workers=workers)
    with context.latex:
        return total(metric, rows, rule.verdicts(rows, context), context)


def total(metric: str, rows: Sequence[Row], verdicts: list[Verdict], context: Context) -> Scored:
    """The scored set from verdicts that are there already."""
    main, scores = METRICS[metric].total(rows, verdicts, context)
    unresolved = sum(not verdict.resolved for verdict in verdicts)
    wrong = [verdict for verdict in verdicts if not 0 <= verdict.score <= 1]
    assert not wrong, wrong[:1]
    return Scored(main=main, scores=scores, verdicts=verdicts, n=len(verdicts), unresolved=unresolved)
