"""What every metric is made of: a verdict per answer, a total, and a judge that is asked a bounded number of times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any, Protocol, TypeVar

from sailvl.verify.math_equal import Latex
from sailvl.verify.options import FAILED

Row = Mapping[str, Any]
"""A sample by column, with its ``prediction``; a cell is a text, a number or None."""

T = TypeVar("T")


class JudgeError(RuntimeError):
    """The judge could not be asked, or gave no reply."""


class Judge(Protocol):
    """A model that reads answers where a rule cannot. Raises JudgeError if there is no reply."""

    def __call__(self, prompt: str, *, temperature: float = 0.0) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One scored answer, or one group of rows that count together.

    ``score`` in [0, 1]; ``extracted``: what the answer was read as; ``resolved`` is False if it could not be read,
    which scores 0; ``detail``: how it was read, for people.
    """

    index: Any
    score: float
    extracted: str | None = None
    resolved: bool = True
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A scored set. ``main`` is the figure people report, in percent; ``scores`` the others, in percent too.

    Exceptions are counts that a set reports itself (MME's sums, OCRBench's hits), under names that say so.
    ``verdicts`` are as many as answers, or groups of answers for sets that count groups; ``n`` and ``unresolved`` count
    verdicts.
    """

    main: float
    scores: dict[str, float]
    verdicts: list[Verdict]
    n: int
    unresolved: int


@dataclass(frozen=True, kw_only=True)
class Context:
    """How a set is scored: the judge if there is one, strict or published rules, threads, the LaTeX process."""

    judge: Judge | None = None
    strict: bool = False
    workers: int = 1
    latex: Latex = field(default_factory=Latex)

    def each(self, function: Callable[[T], Verdict], items: Iterable[T]) -> list[Verdict]:
        """The verdict of each item, in order; in threads if there is a judge to wait for."""
        if self.judge is None or self.workers < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(function, items))

    def ask(self, prompt: str, accept: Callable[[str], T | None], *, tries: int, step: float = 0.0) -> T | None:
        """The first reply of the judge that ``accept`` can read; None without a judge, or after ``tries``.

        The temperature rises by ``step`` with every try. A judge that fails has used up a try.
        """
        if self.judge is None:
            return None
        for turn in range(tries):
            try:
                reply = self.judge(prompt, temperature=turn * step)
            except JudgeError:
                continue
            if f"{FAILED} via API" not in reply:
                found = accept(reply)
                if found is not None:
                    return found
        return None


Verdicts = Callable[[Sequence[Row], Context], list[Verdict]]
Total = Callable[[Sequence[Row], Sequence[Verdict], Context], tuple[float, dict[str, float]]]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A set's rules: verdicts from rows, the total from both, and the columns without which there is no scoring."""

    verdicts: Verdicts
    total: Total
    needs: tuple[str, ...] = ()
    judged: bool = False
    """Whether most answers need a judge, so that without one they are counted as wrong."""


def rowwise(function: Callable[[Row, Context], Verdict]) -> Verdicts:
    """Verdicts of rows that do not depend on each other."""
    return lambda rows, context: context.each(lambda row: function(row, context), rows)


# ---- cells ----------------------------------------------------------------------------------------------------


def missing(cell: object) -> bool:
    """Whether a cell is empty: None, or not a number."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def text(cell: object, strict: bool = False) -> str:
    """A cell as text. A missing one is "nan" in published scores, which may even be right; ``strict``: empty."""
    if missing(cell):
        return "" if strict else "nan"
    return str(cell)


def prediction(row: Row, context: Context) -> str:
    """What the model said."""
    return text(row.get("prediction"), context.strict)


def note(row: Row) -> str:
    """Says if the model said nothing."""
    said = row.get("prediction")
    if missing(said):
        return "no prediction"
    return "the model gave no reply" if isinstance(said, str) and FAILED in said else ""


def options(row: Row) -> dict[str, str]:
    """The options of a row by their letter, empty ones left out."""
    return {letter: str(row[letter]) for letter in ascii_uppercase if not missing(row.get(letter))}


def verdict(row: Row, score: float, extracted: str | None, *, resolved: bool = True, detail: str = "") -> Verdict:
    """The verdict on a row; what it says about missing predictions comes first."""
    detail = "; ".join(part for part in (note(row), detail) if part)
    return Verdict(index=row.get("index"), score=score, extracted=extracted, resolved=resolved, detail=detail)


# ---- totals ---------------------------------------------------------------------------------------------------


def mean(values: Iterable[float]) -> float:
    """Mean in percent; 0 for none."""
    found = list(values)
    return 100 * math.fsum(found) / len(found) if found else 0.0


def groups(rows: Sequence[Row], verdicts: Sequence[Verdict], column: str) -> dict[str, list[float]]:
    """Scores by the text of a column, in alphabetical order; rows without it are in no group."""
    found: dict[str, list[float]] = {}
    for row, verdict in zip(rows, verdicts, strict=True):
        if not missing(row.get(column)):
            found.setdefault(str(row[column]), []).append(verdict.score)
    return dict(sorted(found.items()))


def means(rows: Sequence[Row], verdicts: Sequence[Verdict], *columns: str) -> dict[str, float]:
    """Mean score of every value of the columns, named "column/value", in percent."""
    return {
        f"{column}/{name}": mean(scores)
        for column in columns
        for name, scores in groups(rows, verdicts, column).items()
    }


def plain(*columns: str) -> Total:
    """The total of most sets: the mean over all answers, and over the values of the columns."""

    def total(rows: Sequence[Row], verdicts: Sequence[Verdict], context: Context) -> tuple[float, dict[str, float]]:
        return mean(verdict.score for verdict in verdicts), means(rows, verdicts, *columns)

    return total
