"""The controller against synthetic losses: every row of its decision table, and everything around the table."""

import json
import math
import statistics

import pytest

from sailvl.train.adalrs import AdaLRSController, fit, shrunk_alpha, shrunk_beta

WINDOW = 5


def controller(steps=200, **changes):
    return AdaLRSController(lambda step: 1.0, **{"steps": steps, "window": WINDOW, **changes})


def line(first, velocity, count=WINDOW):
    return [first - velocity * i for i in range(count)]


def feed(search, losses):
    """Actions of all the losses."""
    return [search.observe(loss) for loss in losses]


def at_first_window(**changes):
    """A controller that has seen steps up to its range, with a high maximum, and one BASE window of velocity 0.10."""
    search = controller(**changes)
    assert set(feed(search, [9.0] * search.start_step)) == {"go"}
    assert set(feed(search, line(5.0, 0.10))) == {"go"}
    return search


def in_trial(**changes):
    search = at_first_window(**changes)
    assert feed(search, line(4.5, 0.05)) == ["go"] * 4 + ["snapshot"]
    return search


def test_slope_and_standard_error():
    window = fit([5, 4.6, 4.5, 4.1, 4.0])
    assert window.velocity == pytest.approx(0.25)
    assert window.mean == pytest.approx(4.44)
    losses = [3.0, 2.5, 2.9, 2.0, 2.2, 1.4, 1.9]
    slope, intercept = statistics.linear_regression(range(7), losses)
    residual = sum((loss - intercept - slope * x) ** 2 for x, loss in enumerate(losses))
    assert fit(losses).velocity == pytest.approx(-slope)
    assert fit(losses).error == pytest.approx(math.sqrt(residual / 5 / sum((x - 3) ** 2 for x in range(7))))


def test_check_vector_error():
    assert fit([5, 4.6, 4.5, 4.1, 4.0]).error == pytest.approx(0.03, abs=5e-4)


def test_alpha_and_beta_shrink_to_one():
    assert [shrunk_alpha(3, 0.99, n) for n in range(3)] == pytest.approx([3, 2.97, 2.9403])
    assert [shrunk_beta(2, 0.99, n) for n in range(3)] == pytest.approx([0.5, 0.505051, 0.510152], abs=1e-6)
    assert shrunk_beta(2, 0.99, 68) < 1 == shrunk_beta(2, 0.99, 69)
    assert shrunk_alpha(3, 0.99, 109) > 1 == shrunk_alpha(3, 0.99, 110)


def test_base_without_history_stores_and_goes_on():
    search = at_first_window()
    assert (search.scale, search.phase) == (1.0, "base")


def test_base_that_does_not_slow_down_only_stores():
    search = at_first_window()
    assert feed(search, line(4.5, 0.11)) == ["go"] * WINDOW
    assert feed(search, line(3.9, 0.10))[-1] == "snapshot"  # slower than 0.11, though as fast as the first window


def test_base_that_slows_down_tries_a_higher_rate():
    search = in_trial()
    assert (search.scale, search.phase) == (3.0, "trial")


def test_base_whose_mean_rises_twice_lowers_the_rate_without_trial():
    search = at_first_window()
    # Rising means with ever larger velocities inside the windows, so that no trial starts before.
    assert feed(search, line(5.4, 0.2)) == ["go"] * WINDOW
    assert search.scale == 1.0
    assert feed(search, line(6.2, 0.3)) == ["go"] * WINDOW
    assert search.scale == 0.5
    assert feed(search, line(6.0, 0.01)) == ["go"] * WINDOW, "history was cleared: nothing to compare with"
    assert search.state_dict()["resolved"] == 1


def test_one_rise_is_forgotten_by_a_fall():
    search = at_first_window()
    feed(search, line(5.4, 0.2))
    feed(search, line(4.0, 0.3))
    feed(search, line(5.4, 0.4))
    assert search.scale == 1.0


def test_trial_clearly_faster_keeps_the_rate():
    search = in_trial()
    assert feed(search, line(4.2, 0.2)) == ["go"] * WINDOW
    assert (search.scale, search.phase) == (3.0, "base")
    assert feed(search, line(3.2, 0.1))[-1] == "snapshot", "the trial's velocity is the new history"
    assert search.scale == pytest.approx(3.0 * 2.97)


def test_trial_clearly_slower_rolls_back_and_lowers_the_rate():
    search = in_trial()
    assert feed(search, line(4.2, 0.01)) == ["go"] * 4 + ["rollback"]
    assert (search.scale, search.phase) == (0.5, "base")
    assert feed(search, line(4.2, 0.001)) == ["go"] * WINDOW, "history was cleared"
    assert feed(search, line(4.2, 0.0001))[-1] == "snapshot"
    assert search.scale == pytest.approx(0.5 * 2.97)


NOISY = [4.2, 4.12, 4.15, 4.02, 4.05]
"""Velocity 0.04, standard error 0.0120: neither clearly faster nor slower than 0.05."""


def test_trial_between_returns_the_rate_and_keeps_the_weights():
    search = in_trial()
    assert feed(search, NOISY) == ["go"] * WINDOW
    assert (search.scale, search.phase) == (1.0, "base")
    assert search.state_dict()["history"]["velocity"] == pytest.approx(0.04)
    assert search.state_dict()["resolved"] == 1


def test_margin_zero_removes_the_bound():
    assert feed(in_trial(margin=0), NOISY)[-1] == "rollback"


def test_the_larger_of_both_errors_is_the_bound():
    search = at_first_window()
    noisy_base = [4.5, 4.3, 4.55, 4.2, 4.4]  # velocity 0.03, error 0.05
    assert feed(search, noisy_base)[-1] == "snapshot"
    assert feed(search, line(4.4, 0.09)) == ["go"] * WINDOW  # exact line: its own error is 0
    assert search.scale == 1.0


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 9.001])
def test_a_loss_that_is_not_finite_or_above_the_maximum_ends_a_trial_at_once(loss):
    search = in_trial()
    assert feed(search, [4.2, loss]) == ["go", "rollback"]
    assert (search.scale, search.phase) == (0.5, "base")


def test_the_maximum_itself_does_not_end_a_trial():
    assert feed(in_trial(), [9.0]) == ["go"]


def test_losses_of_the_warm_up_do_not_count_as_maximum():
    search = controller(warmup_steps=10)
    feed(search, [50.0] * 10 + [6.0] * (search.start_step - 10) + line(5.0, 0.1) + line(4.5, 0.05))
    assert feed(search, [6.1]) == ["rollback"]


def test_a_lost_loss_outside_a_trial_restarts_the_window():
    search = at_first_window()
    assert feed(search, [4.4, 4.3, float("nan"), *line(4.4, 0.05, 4)]) == ["go"] * 7
    assert feed(search, [4.2])[-1] == "snapshot"


def test_nothing_happens_outside_the_range_and_the_scale_is_frozen_after_it():
    search = controller(steps=200)
    falling = [10 / (1 + step) for step in range(20)]
    assert set(feed(search, falling)) == {"go"} and search.state_dict()["losses"] == []
    actions = feed(search, [3 - 0.01 * step + 0.001 * step * step % 0.05 for step in range(60)])
    assert "snapshot" in actions
    while search.phase == "trial":
        search.observe(2.0)
    scale = search.scale
    assert set(feed(search, [5.0, 1.0, 4.0, 0.5, 9.0] * 20)) == {"go"}
    assert search.scale == scale


def test_a_trial_that_runs_past_the_range_is_resolved():
    search = controller(steps=100, stop=0.3)
    feed(search, [9.0] * 10)
    feed(search, line(6.0, 0.10))
    feed(search, line(5.5, 0.10))
    feed(search, line(5.0, 0.10 + 1e-6))
    assert feed(search, line(4.5, 0.05))[-1] == "snapshot" and search.state_dict()["step"] == 30
    assert feed(search, line(4.2, 0.01))[-1] == "rollback"
    assert set(feed(search, line(4.0, 0.1) + line(4.0, 0.01))) == {"go"}
    assert search.scale == 0.5


def test_a_window_cut_by_the_end_of_the_range_decides_nothing():
    search = controller(steps=100, stop=0.32)
    feed(search, [9.0] * 10)
    for first in (6.0, 5.5, 5.0, 4.5):
        feed(search, line(first, 0.10))
    assert set(feed(search, line(4.0, 0.01) + line(4.0, 0.01))) == {"go"}


def test_no_trial_once_alpha_is_one():
    search = controller()
    search.load_state_dict({**at_first_window().state_dict(), "resolved": 110})
    assert set(feed(search, line(4.5, 0.05))) == {"go"}


def test_rewind_takes_the_step_back():
    kept, rewound = in_trial(rewind=False), in_trial(rewind=True)
    before = rewound.state_dict()["step"]
    assert feed(kept, [4.2, 99.0])[-1] == feed(rewound, [4.2, 99.0])[-1] == "rollback"
    assert kept.state_dict()["step"] == before + 2
    assert rewound.state_dict()["step"] == before


def test_state_round_trip_inside_a_trial_equals_going_on():
    whole = in_trial()
    feed(whole, [4.2, 4.15])
    resumed = controller()
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    rest = [*line(4.1, 0.02, 3), *line(4.0, 0.1), *line(3.9, 0.05), *line(3.8, 0.2)]
    pairs = [((whole.observe(loss), whole.scale), (resumed.observe(loss), resumed.scale)) for loss in rest]
    assert all(a == b for a, b in pairs) and whole.state_dict() == resumed.state_dict()
    assert len({action for (action, _), _ in pairs}) > 1


def test_a_saved_state_does_not_change_afterwards():
    search = at_first_window()
    state = search.state_dict()
    frozen = json.dumps(state)
    feed(search, [4.4, 4.3])
    assert json.dumps(state) == frozen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 21}, "searches from step 20 but warm-up lasts 21"),
        ({"window": 16}, "searches 60 steps, fewer than 4 windows of 16"),
        ({"window": 2}, "at least 3"),
        ({"alpha": 1.0}, "above 1"),
    ],
)
def test_impossible_searches_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        controller(steps=200, **changes)


def test_the_range_does_not_suffer_from_rounding():
    assert controller(steps=70).start_step == 7  # 0.1 * 70 is 7.000000000000001 in floating point
