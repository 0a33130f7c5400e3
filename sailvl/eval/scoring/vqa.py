"""Short free answers: documents, charts, scene text, book covers, and boxes. Rules decide alone; no judge."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sailvl.eval.scoring.base import (
    Context,
    Metric,
    Row,
    Verdict,
    groups,
    mean,
    means,
    missing,
    plain,
    rowwise,
    text,
    verdict,
)
from sailvl.eval.scoring.base import prediction as said
from sailvl.verify.boxes import Box, box_iou, four_numbers, to_pixels
from sailvl.verify.literal import answers
from sailvl.verify.vqa import Compared, Method, compare, contains, norm, total


def truths(row: Row, context: Context) -> list[str]:
    """The accepted answers of a row: the items of a list literal, or the cell as text."""
    return answers(text(row.get("answer"), context.strict)) or [""]


def compared(row: Row, context: Context, method: Method) -> Compared:
    """The prediction against each truth of its row."""
    return compare(said(row, context), truths(row, context), method, strict=context.strict)


def _answer(row: Row, context: Context, *, method: Method) -> Verdict:
    found = compared(row, context, method)
    return verdict(row, total(found, method), found.answer)


def _exact(row: Row, context: Context) -> Verdict:
    given = norm(said(row, context), every_period=True)
    right = given in [norm(truth, every_period=True) for truth in truths(row, context)]
    return verdict(row, float(right), given)


# ---- OCRBench -------------------------------------------------------------------------------------------------

FORMULAS = "Handwritten Mathematical Expression Recognition"


def _ocrbench(row: Row, context: Context) -> Verdict:
    reply, formula = said(row, context), row.get("category") == FORMULAS
    wanted = [truth for truth in truths(row, context) if truth.strip() or not context.strict]
    return verdict(row, float(any(contains(reply, truth, formula=formula) for truth in wanted)), reply)


def _ocrbench_total(
    rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context
) -> tuple[float, dict[str, float]]:
    """Hits over ten, for a set of a thousand; strict scoring divides by the number of rows."""
    hits = sum(one.score for one in verdicts)
    by_name = {f"hits/{name}": sum(scores) for name, scores in groups(rows, verdicts, "category").items()}
    return mean(one.score for one in verdicts) if context.strict else hits / 10, {"hits": hits} | by_name


# ---- boxes ----------------------------------------------------------------------------------------------------

SPLITS = (
    *("RefCOCO_val", "RefCOCO_testA", "RefCOCO_testB", "RefCOCO+_val", "RefCOCO+_testA", "RefCOCO+_testB"),
    *("RefCOCOg_val", "RefCOCOg_test"),
)


def _side(row: Row, column: str) -> float:
    """Width or height in pixels; 1 if it is missing, so that fractions still work."""
    value = _real(row.get(column))
    return value if value is not None and value > 0 else 1.0


def _real(cell: object) -> float | None:
    try:
        return None if missing(cell) else float(str(cell))
    except ValueError:
        return None


def true_box(row: Row, *, fractions: bool) -> Box | None:
    """A row's box in pixels: the columns ``bbox_x1`` .., else ``answer``, else ``x1`` .., else ``bbox``.

    ``answer`` holds pixels unless ``fractions``, which is decided for the whole set.
    """
    width, height = _side(row, "width"), _side(row, "height")
    for prefix in ("bbox_", ""):
        x1, y1, x2, y2 = (_real(row.get(f"{prefix}{name}")) for name in ("x1", "y1", "x2", "y2"))
        if x1 is not None and y1 is not None and x2 is not None and y2 is not None:
            return x1, y1, x2, y2
        numbers = four_numbers(str(row.get("answer"))) if prefix else None
        if numbers is not None:
            sides = (width, height, width, height) if fractions else (1.0, 1.0, 1.0, 1.0)
            x1, y1, x2, y2 = (number * side for number, side in zip(numbers, sides, strict=True))
            return x1, y1, x2, y2
    numbers = four_numbers(str(row.get("bbox")))
    return None if numbers is None else to_pixels(numbers, width, height)


def in_fractions(rows: Sequence[Row]) -> bool:
    """Whether the boxes in the column ``answer`` are fractions: no number of the whole set is above 1.5."""
    found = [four_numbers(str(row.get("answer"))) for row in rows]
    return all(abs(number) <= 1.5 for numbers in found if numbers is not None for number in numbers)


def given_box(row: Row, context: Context) -> Box | None:
    """The box of a prediction in pixels, or None."""
    numbers = four_numbers(said(row, context))
    return None if numbers is None else to_pixels(numbers, _side(row, "width"), _side(row, "height"))


def _boxes(rows: Sequence[Row], context: Context) -> list[Verdict]:
    fractions = in_fractions(rows)

    def one(row: Row) -> Verdict:
        wanted, given = true_box(row, fractions=fractions), given_box(row, context)
        if wanted is None:
            return verdict(row, 0.0, None, detail="the row has no true box")
        if given is None:
            return verdict(row, 0.0, None, detail="no box in the reply")
        overlap = box_iou(given, wanted)
        shown = "[" + ", ".join(f"{value:.2f}" for value in given) + "]"
        return verdict(row, float(overlap >= 0.5), shown, detail=f"IoU {overlap:.4f}")

    return [one(row) for row in rows]


def _boxes_total(rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context) -> tuple[float, dict[str, float]]:
    """The mean over the known splits; without any of them, over rows."""
    scores = means(rows, verdicts, "split")
    known = [scores[f"split/{name}"] for name in SPLITS if f"split/{name}" in scores]
    overall = mean(one.score for one in verdicts)
    return sum(known) / len(known) if known else overall, scores | {"by row": overall}


def _short(method: Method) -> Metric:
    return Metric(
        verdicts=rowwise(partial(_answer, method=method)), total=plain("split", "category"), needs=("answer",)
    )


VQA: dict[str, Metric] = {
    "anls": _short("anls"),
    "chartqa": _short("relaxed"),
    "vqa": _short("vqa"),
    "ocrvqa": _short("equal_max"),
    "gqa": _short("equal_mean"),
    "vqa_exact": Metric(verdicts=rowwise(_exact), total=plain("split", "category"), needs=("answer",)),
    "ocrbench": Metric(verdicts=rowwise(_ocrbench), total=_ocrbench_total, needs=("answer",)),
    "refcoco": Metric(verdicts=_boxes, total=_boxes_total),
}
