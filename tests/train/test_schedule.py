from itertools import pairwise

import pytest

from sailvl.curriculum import WSD, AdaLRS, Constant, Cosine
from sailvl.train import schedule


def factors(value, steps):
    built = schedule.build(value, steps)
    return [built.factor(step) for step in range(steps)]


def test_constant_warms_up_and_stays():
    assert factors(Constant(warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_starts_at_the_peak_ends_at_final_and_never_rises():
    values = factors(Cosine(warmup_steps=2, final=0.1), 101)
    assert values[:3] == [0.5, 1.0, 1.0]
    assert values[-1] == pytest.approx(0.1, abs=1e-12)
    assert values[51] == pytest.approx(0.55, abs=1e-12)
    assert all(a >= b for a, b in pairwise(values[2:]))


def test_wsd_is_flat_then_linear_to_final():
    values = factors(WSD(warmup_steps=2, decay_steps=4, final=0.2), 10)
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_a_stage_of_one_step_trains():
    for value in (Constant(), Cosine(), WSD(decay_steps=0)):
        assert factors(value, 1) == [1.0]


def test_what_does_not_fit_is_refused_with_counts():
    with pytest.raises(ValueError, match="6 warm-up and 5 decay steps do not fit in 10"):
        schedule.build(WSD(warmup_steps=6, decay_steps=5), 10)


def test_a_fixed_schedule_never_asks_for_anything_and_refuses_foreign_state():
    built = schedule.build(Cosine(), 10)
    assert [built.observe(loss) for loss in (1.0, float("nan"), None)] == ["go"] * 3
    built.load_state_dict(built.state_dict())
    with pytest.raises(ValueError, match="fixed schedule"):
        built.load_state_dict({"scale": 2.0})


@pytest.mark.parametrize("base", [Cosine(warmup_steps=5, final=0.1), WSD(warmup_steps=5, decay_steps=20)])
def test_adalrs_multiplies_its_base(base):
    fixed, search = schedule.build(base, 100), schedule.build(AdaLRS(base=base, window=5), 100)
    assert [search.factor(step) for step in range(100)] == [fixed.factor(step) for step in range(100)]
    state = {**search.state_dict(), "scale": 3.0}
    search.load_state_dict(state)
    assert [search.factor(step) for step in range(100)] == [3 * fixed.factor(step) for step in range(100)]
