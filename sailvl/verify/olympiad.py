r"""Is the answer of a competition problem right? OlympiadBench's open questions, whose answers are LaTeX.

An answer may be several values, in any order, intervals, expressions or equations, and the benchmark states how far
off a number may be. This is our reading of the benchmark's published rule (arXiv 2402.14008), checked against no
recorded verdicts: figures may differ from other tools' in rare forms.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sailvl.verify.cleanup import all_boxed
from sailvl.verify.math_equal import Latex

PRECISION = 1e-8
MAX_VALUES = 20
"""Values in one answer that are still paired."""

_ENDINGS = ("So the final answer is ", "所以最终答案是")
_DECORATION = (
    *(("\\left", ""), ("\\right", ""), ("∶", ":"), ("，", ","), ("$", ""), ("\\approx", "="), ("\\simeq", "=")),
    *(
        ("\\sim", "="),
        ("^\\prime", "'"),
        ("^{\\prime}", "'"),
        ("^\\circ", ""),
        ("^{\\circ}", ""),
        ("\\%", ""),
        ("%", ""),
    ),
)
_FORMULA = re.compile(r"\$([^$]*+)\$")
_UPRIGHT = re.compile(r"\\(?:mathrm|mathbf)\{~?([^{}]*+)\}")
_HAN = re.compile("[\u4e00-\u9fff]+")


def final_part(reply: str, *, chinese: bool) -> str:
    """What the reply gives as its answer: the rest of the line after the last announcement, else all of it."""
    _, mark, tail = reply.rpartition(_ENDINGS[chinese])
    return tail.partition("\n")[0].strip() if mark else reply


def precisions(cell: object) -> list[float]:
    """How far off each value may be: one number, or several with commas between; nothing is PRECISION."""
    if cell is None or str(cell).strip().lower() in ("", "nan"):
        return [PRECISION]
    found = []
    for part in str(cell).split(","):
        try:
            found.append(float(part) if part.strip() else PRECISION)
        except ValueError:
            found.append(PRECISION)
    return found


def olympiad_right(answer: str, truth: str, latex: Latex, within: Sequence[float] = (PRECISION,)) -> bool:
    """Whether every value of the answer can be paired with one of the truth, and none is left over.

    ``within``: one tolerance for all, or one per value of the truth. Costs at most MAX_VALUES squared comparisons.
    """
    answer, truth = _plain(answer), _plain(truth)
    if answer == truth:
        return bool(answer)
    given, wanted = (_values(_HAN.sub("", text)) for text in (answer, truth))
    if len(given) != len(wanted) or len(wanted) > MAX_VALUES:
        return False
    for place, value in enumerate(wanted):
        tolerance = within[place] if place < len(within) and len(within) > 1 else within[0]
        partner = next((other for other in given if _same(other, value, latex, tolerance)), None)
        if partner is None:
            return False
        given.remove(partner)
    return bool(wanted)


def _plain(text: str) -> str:
    """Boxed contents, else the formulas of the last line, else all; signs that only decorate taken out."""
    found = all_boxed(text) or _FORMULA.findall(text.strip().rpartition("\n")[2])
    text = ",".join(found) if found else text
    if "\\in " in text:
        text = text.split("\\in ")[1]
    for sign, plain in _DECORATION:
        text = text.replace(sign, plain)
    return _UPRIGHT.sub(r"\1", text.strip("\n\t $,.:;^_=+`!@#%&*~，。"))


def _values(text: str) -> list[str]:
    """The parts between commas that stand in no bracket; one with a plus-minus sign is two values."""
    parts, depth, start = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    parts.append(text[start:].strip())
    return [
        choice
        for part in parts
        if part
        for choice in ([part.replace("\\pm", "+"), part.replace("\\pm", "-")] if "\\pm" in part else [part])
    ]


def _same(answer: str, truth: str, latex: Latex, tolerance: float) -> bool:
    if answer == truth:
        return True
    if _is_interval(answer) and _is_interval(truth):
        return _same_intervals(answer, truth, latex, tolerance)
    try:
        given, wanted = float(answer), float(truth)
        return any(abs(given * factor - wanted) <= tolerance * 1.01 for factor in (1, 0.01, 100))
    except ValueError:
        pass
    if "=" in answer and "=" in truth:
        return latex.ask("equation", truth, answer)
    return latex.ask("value", truth, answer, tolerance)


def _is_interval(text: str) -> bool:
    return text[:1] in ("(", "[") and text[-1:] in (")", "]")


def _same_intervals(answer: str, truth: str, latex: Latex, tolerance: float) -> bool:
    r"""Unions (``\cup``) part by part: the same brackets around the same values, in order."""
    given, wanted = ([part.strip() for part in text.split("\\cup")] for text in (answer, truth))
    if len(given) != len(wanted):
        return False
    for one, other in zip(given, wanted, strict=True):
        ends, other_ends = _values(one[1:-1]), _values(other[1:-1])
        if one[:1] + one[-1:] != other[:1] + other[-1:] or len(ends) != len(other_ends):
            return False
        if not all(_same(a, b, latex, tolerance) for a, b in zip(ends, other_ends, strict=True)):
            return False
    return True
