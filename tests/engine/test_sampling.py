import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sailvl.engine.base import Sampling
from sailvl.engine.sampling import Chooser, choose, draw


def allowed(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """The distribution, one rule after the other, in plain Python."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = order[:top_k]
    weights = {i: math.exp((logits[i] - max(logits)) / temperature) for i in order}
    total = sum(weights.values())
    weights = {i: weight / total for i, weight in weights.items()}
    if top_p < 1:
        kept, mass = {}, 0.0
        for i in order:
            if mass >= top_p:
                break
            kept[i] = weights[i]
            mass += weights[i]
        weights = kept
    most = max(weights.values())
    weights = {i: weight for i, weight in weights.items() if weight >= min_p * most}
    total = sum(weights.values())
    return {i: weight / total for i, weight in weights.items()}


@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([1.0, 0.9, 0.4, 0.01]),
    min_p=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_draws_follow_the_distribution(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    rng = random.Random(seed)
    logits = [rng.gauss(0, 2) for _ in range(12)]
    logits[rng.randrange(12)] = float("-inf")
    expected = allowed(logits, temperature, top_k, top_p, min_p)
    steps = 400
    at = [(step + 0.5) / steps for step in range(steps)]
    rows = torch.tensor(logits, dtype=torch.float64).expand(steps, -1)
    counts = Counter(draw(rows, at, temperature, top_k, top_p, min_p))
    for id in range(12):
        assert abs(counts[id] / steps - expected.get(id, 0.0)) <= 1.01 / steps, id


@pytest.mark.parametrize("temperature", [1e-40, 1e-9, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, float("-inf")]])
    assert draw(logits, [0.999999], temperature, 0, 1.0, 0.0) == [1]


@pytest.mark.parametrize("limits", [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.99, 0.0), (0, 1.0, 0.01)])
def test_no_number_draws_a_banned_token(limits) -> None:
    logits = torch.full((1, 7), float("-inf"))
    logits[0, 2] = logits[0, 4] = 0.0
    assert draw(logits, [1 - 2**-53], 1.0, *limits) == [4]
    assert draw(logits, [0.0], 1.0, *limits) == [2]


def test_penalties_follow_their_formulas() -> None:
    sampling = Sampling(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    chooser = Chooser(sampling, 0, prompt=[1, 1, 5])
    for id in (3, 3, 4):
        chooser.chose(id)
    logits = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
    chooser.penalise(logits)
    # 1 and 5 are in the prompt: divided, multiplied; 3 twice and 4 once in the answer: both rules, in this order.
    assert logits.tolist() == [1.0, 0.5, 1.0, 0.5 - 0.5 - 0.5, -2.0 - 0.5 - 0.25, -2.0]


def test_penalties_change_what_is_chosen_next() -> None:
    for penalty in ("presence_penalty", "frequency_penalty"):
        chooser = Chooser(Sampling(**{penalty: 1.5}), 0, [])
        said = [choose(torch.tensor([[2.0, 1.0, 0.9]]), [chooser])[0].id for _ in range(4)]
        assert said == [0, 1, 2, 0], penalty
    chooser = Chooser(Sampling(repetition_penalty=3.0), 0, [2])
    assert [choose(torch.tensor([[2.0, 1.0, 2.9]]), [chooser])[0].id for _ in range(2)] == [0, 1]


def test_logprobs_are_the_models_own() -> None:
    """Before temperature and penalties, over what is not banned."""
    logits = torch.tensor([[1.0, 2.0, 0.5, float("-inf")]])
    truth = torch.tensor([1.0, 2.0, 0.5]).log_softmax(0).tolist()
    sampling = Sampling(temperature=7.0, presence_penalty=2.0, seed=0, top_logprobs=5)
    chooser = Chooser(sampling, 0, [])
    chooser.chose(1)
    (choice,) = choose(logits.clone(), [chooser])
    assert choice.logprob == pytest.approx(truth[choice.id])
    assert [id for id, _ in choice.top] == [1, 0, 2]
    assert [value for _, value in choice.top] == pytest.approx([truth[1], truth[0], truth[2]])
    (plain,) = choose(logits.clone(), [Chooser(Sampling(), 0, [])])
    assert (plain.id, plain.logprob, plain.top) == (1, None, ())
    (bare,) = choose(logits.clone(), [Chooser(Sampling(top_logprobs=0), 0, [])])
    assert bare.logprob == pytest.approx(truth[1]) and bare.top == ()


def test_rows_do_not_meet() -> None:
    """What a row draws depends on its own seed and index, not on the others or their order."""
    torch.manual_seed(0)
    logits = torch.randn(9, 50)
    samplings = [
        Sampling(temperature=1 + row % 3, top_k=5 * (row % 2), top_p=0.9, seed=row // 2, repetition_penalty=1.2)
        if row % 4
        else Sampling()
        for row in range(9)
    ]

    def say(order: list[int]) -> dict[int, int]:
        choosers = [Chooser(samplings[row], row, [row]) for row in order]
        return dict(zip(order, (choice.id for choice in choose(logits[order].clone(), choosers)), strict=True))

    together = say(list(range(9)))
    assert together == say([8, 1, 3, 0, 2, 7, 5, 6, 4])
    assert together == {row: say([row])[row] for row in range(9)}


def test_seeds() -> None:
    logits = torch.zeros(1, 1000)

    def said(seed: int | None, index: int) -> list[int]:
        chooser = Chooser(Sampling(temperature=1.0, seed=seed), index, [])
        return [choose(logits.clone(), [chooser])[0].id for _ in range(5)]

    assert said(3, 0) == said(3, 0) == [518, 514, 844, 23, 711]  # the same on every machine
    assert said(3, 0) != said(3, 1) != said(4, 1)
    assert said(None, 0) != said(None, 0)


def test_half_precision_logits() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.bfloat16)
    sampling = Sampling(temperature=1.0, seed=1, top_logprobs=1)
    (choice,) = choose(logits, [Chooser(sampling, 0, [])])
    assert choice.logprob == pytest.approx(torch.tensor([1.0, 2.0, 0.5]).log_softmax(0)[choice.id].item())
