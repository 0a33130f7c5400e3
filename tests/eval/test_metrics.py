import math

import numpy as np
import pytest

from sailvl.eval.metrics import Judged, corrected, headline, paired_change, summarise, wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        # Published: Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_published_intervals(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_wilson_is_symmetric_and_stays_inside(n: int) -> None:
    for hits in range(n + 1):
        low, high = wilson(hits, n)
        assert 0 <= low <= hits / n <= high <= 1
        assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low))
    assert wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1
    assert wilson(0, 0) == (0, 1)


def test_corrected() -> None:
    assert corrected(0.5, 0.5) == 0
    assert corrected(1.0, 0.25) == 1
    assert corrected(0.25, 0.5) == -0.5


def rows(family: str, scores: list[float], chance: float) -> list[Judged]:
    return [Judged(family=family, lang="en", score=score, chance=chance) for score in scores]


def test_summarise() -> None:
    score = summarise(rows("f", [1, 0, 1, 1], 0.5))
    assert (score.n, score.accuracy, score.chance, score.corrected) == (4, 0.75, 0.5, 0.5)
    with pytest.raises(ValueError, match="no answers"):
        summarise([])


def test_headline_weighs_families_equally() -> None:
    judged = rows("large", [1.0] * 300, 0.5) + rows("small", [0.0, 1.0], 0.0)
    assert headline(judged).mean == pytest.approx((1 + 0.5) / 2)


def test_headline_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        judged = rows("a", list(rng.random(60) < 0.7), 0.0) + rows("b", list(rng.random(40) < 0.4), 0.2)
        found = headline(judged, draws=300, seed=trial)
        covered += found.low <= (0.7 + corrected(0.4, 0.2)) / 2 <= found.high
    assert 176 <= covered <= 200


def test_paired_change() -> None:
    change, half = paired_change([0, 0, 1, 1], [1, 0, 1, 1])
    assert change == 0.25
    assert half == pytest.approx(1.959964 * math.sqrt(0.25 / 4), rel=1e-5)
    assert paired_change([1.0] * 10, [1.0] * 10) == (0.0, 0.1)
    with pytest.raises(ValueError, match="equal counts"):
        paired_change([1.0], [])
