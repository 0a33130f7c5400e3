from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sailvl.data.order import Order, feistel


@pytest.mark.parametrize("n", [*range(1, 200), 4095, 4096, 4097])
def test_feistel_is_a_bijection(n: int) -> None:
    assert sorted(feistel(i, n, 7) for i in range(n)) == list(range(n))


def test_feistel_depends_on_the_key_and_mixes() -> None:
    orders = [[feistel(i, 500, key) for i in range(500)] for key in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    # positions of one row over many keys spread over the range: mean of 20 uniform draws is 249.5 +- 32 (one sigma)
    assert all(120 < sum(order.index(row) for order in orders) / 20 < 380 for row in (0, 250, 499))
    steps = Counter(b - a for a, b in zip(orders[0], orders[0][1:], strict=False))
    assert steps.most_common(1)[0][1] < 10


@pytest.mark.parametrize("i", [-1, 5])
def test_feistel_refuses_positions_outside(i: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        feistel(i, 5, 0)


def test_shares_are_exact_at_every_common_multiple() -> None:
    shares = {"a": 0.3, "b": 0.5, "c": 0.15, "d": 0.05}
    order = Order(dict.fromkeys(shares, 50), shares, seed=1)
    counts: Counter[str] = Counter()
    for t in range(1, 2001):
        counts[order.names[order.draw()[0]]] += 1
        if t % 20 == 0:
            assert {name: counts[name] * 20 for name in shares} == {"a": 6 * t, "b": 10 * t, "c": 3 * t, "d": t}


@given(
    st.lists(st.floats(0.001, 1000, allow_nan=False), min_size=1, max_size=7),
    st.integers(1, 400),
)
def test_no_source_is_ever_a_sample_ahead_of_its_share(weights: list[float], num_draws: int) -> None:
    shares = {f"s{i}": weight for i, weight in enumerate(weights)}
    order = Order(dict.fromkeys(shares, 10), shares, seed=0)
    for _ in range(num_draws):
        order.draw()
    for weight, count in zip(weights, order.counts, strict=True):
        due = num_draws * weight / sum(weights)
        assert count - due < 1 + 1e-6
        assert due - count < len(weights)


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 5])
def test_lanes_together_read_every_epoch_once(num_lanes: int) -> None:
    lanes = [Order({"a": 30}, {"a": 1.0}, seed=4, lane=v, num_lanes=num_lanes) for v in range(num_lanes)]
    rows = [lane.draw()[1] for _ in range(60 // num_lanes) for lane in lanes]
    assert sorted(rows[:30]) == sorted(rows[30:]) == list(range(30))
    assert rows[:30] != rows[30:]
    alone = Order({"a": 30}, {"a": 1.0}, seed=4)
    assert rows == [alone.draw()[1] for _ in range(60)]


@given(st.integers(0, 300))
def test_resume_continues_exactly(at: int) -> None:
    def new() -> Order:
        return Order({"a": 7, "b": 40, "c": 1}, {"a": 0.2, "b": 0.7, "c": 0.1}, seed=9, lane=1, num_lanes=3)

    first, second = new(), new()
    for _ in range(at):
        first.draw()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [first.draw() for _ in range(30)] == [second.draw() for _ in range(30)]


def test_sources_are_ordered_independently() -> None:
    order = Order({"a": 100, "b": 100}, {"a": 0.5, "b": 0.5}, seed=0)
    draws = [order.draw() for _ in range(200)]
    assert [row for source, row in draws if source == 0] != [row for source, row in draws if source == 1]


@pytest.mark.parametrize(
    ("sizes", "shares", "fault"),
    [
        ({"a": 1}, {"b": 1.0}, "shares name"),
        ({"a": 0}, {"a": 1.0}, "no rows in source a"),
        ({"a": 1, "b": 1}, {"a": 1.0, "b": 0.0}, "share of b"),
        ({"a": 1}, {"a": float("nan")}, "share of a"),
    ],
)
def test_impossible_mixtures_are_refused(sizes: dict[str, int], shares: dict[str, float], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Order(sizes, shares, seed=0)
