"""From scores of single answers to figures with their uncertainty.

A family's accuracy comes with a 95 % Wilson interval, which stays inside [0, 1] and is honest for small counts, where
the usual plus-minus is not. Accuracy is set against chance, the expected score of an answer that ignores the picture:
(accuracy - chance) / (1 - chance) is 0 for guessing and 1 for perfection, so that yes/no questions and readings can
share a mean. It is not clipped: below chance is below zero.

The headline is the mean of the chance-corrected accuracies over families. Its interval is a bootstrap over questions
within each family: it says how far other questions of the same kinds would move it, not other kinds or other seeds.
A family whose answers are all right or all wrong adds no width to it, so at the ends of the scale it is too narrow;
the families' own intervals are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One scored answer: ``score`` in [0, 1], ``chance`` in [0, 1)."""

    family: str
    lang: str
    score: float
    chance: float


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy over ``n`` answers with its 95 % interval, mean chance, and accuracy corrected for chance."""

    n: int
    accuracy: float
    low: float
    high: float
    chance: float
    corrected: float


@dataclass(frozen=True, kw_only=True)
class Headline:
    """Mean chance-corrected accuracy over families, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share (E. B. Wilson, JASA 1927); (0, 1) for n = 0.

    ``hits`` may be a sum of fractional scores: their variance is at most that of hits and misses, so the interval is
    then too wide rather than too narrow.
    """
    if n == 0:
        return 0.0, 1.0
    share = hits / n
    middle = share + Z95**2 / (2 * n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    # The exact bounds at 0 and n hits are 0 and 1; rounding must not miss them by an ulp.
    low = 0.0 if hits == 0 else max(0.0, (middle - half) / scale)
    high = 1.0 if hits == n else min(1.0, (middle + half) / scale)
    return low, high


def corrected(accuracy: float, chance: float) -> float:
    """Accuracy on a scale where guessing is 0 and perfection 1."""
    return (accuracy - chance) / (1 - chance)


def summarise(judged: Sequence[Judged]) -> Score:
    """The score of a set of answers taken together. Raises ValueError for none."""
    if not judged:
        raise ValueError("no answers to summarise")
    n = len(judged)
    hits = math.fsum(row.score for row in judged)
    chance = math.fsum(row.chance for row in judged) / n
    low, high = wilson(hits, n)
    accuracy = hits / n
    return Score(n=n, accuracy=accuracy, low=low, high=high, chance=chance, corrected=corrected(accuracy, chance))


def by_family(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
    """The answers of each family, families in alphabetical order."""
    groups: dict[str, list[Judged]] = {}
    for row in judged:
        groups.setdefault(row.family, []).append(row)
    return dict(sorted(groups.items()))


def headline(judged: Iterable[Judged], *, draws: int = 2000, seed: int = 0) -> Headline:
    """Mean over families of chance-corrected accuracy; every family weighs the same, whatever its size.

    Costs ``draws`` resamplings of all answers: 0.1 s for 2,000 answers.
    """
    families = by_family(judged)
    if not families:
        raise ValueError("no answers to summarise")
    rng = np.random.default_rng(seed)
    total = np.zeros(draws)
    mean = 0.0
    for rows in families.values():
        scores = np.array([row.score for row in rows])
        chances = np.array([row.chance for row in rows])
        picks = rng.integers(len(rows), size=(draws, len(rows)))
        chance = chances[picks].mean(axis=1)
        total += (scores[picks].mean(axis=1) - chance) / (1 - chance)
        mean += corrected(float(scores.mean()), float(chances.mean()))
    low, high = np.quantile(total / len(families), [0.025, 0.975])
    return Headline(mean=mean / len(families), low=float(low), high=float(high))


def paired_change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean change of score between two runs over the same questions, and the half width of its 95 % interval.

    Pairing removes the spread of difficulty between questions. With no question changed the half width is that of
    one change (1/n): nothing seen is not certainty.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"paired scores need equal counts above 0, got {len(before)} and {len(after)}")
    change = np.array(after) - np.array(before)
    n = len(change)
    spread = float(change.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
    return float(change.mean()), max(Z95 * spread, 1.0 / n)
