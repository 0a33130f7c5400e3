"""AdaLRS: find the learning rate while training, by watching how fast the loss falls.

For a small step the expected change of the loss is -lr |g|^2 + (C/2) lr^2 |g|^2, so the learning rate that lowers
the loss fastest is also the best one, and the slope of the loss is a signal that costs nothing to measure. The
controller fits a line to windows of ``window`` losses. When the descent slows down it tries ``alpha`` times the
learning rate for one window; if the descent is clearly faster it keeps it, if clearly slower it goes back to the
weights from before the trial and divides the learning rate by ``beta`` instead.

Pure Python floats on the host: it decides, the loop owns every tensor. ``observe`` answers "snapshot" when the loop
must keep a copy of the weights and optimizer, "rollback" when it must return to that copy.

Source: AdaLRS, arXiv 2506.13274; SAIL-VL2, arXiv 2509.14033, uses it in basic multimodal pre-training. The authors
published no code, and these choices are ours:
- the error bound e is the larger standard error of the two fitted slopes, times ``margin`` (0 removes the bound);
- alpha and beta move towards 1 with the number of *resolved* adjustments (with the number of steps, the search would
  be over after 110 of them), and no trial starts once alpha has reached 1;
- after a rollback the data runs on: no sample is used twice; ``rewind`` puts the data back too;
- an undecided trial keeps its weights and returns to the old learning rate;
- a trial ends at once when a step's loss exceeds every loss since warm-up or is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Action = Literal["go", "snapshot", "rollback"]


@dataclass(frozen=True, kw_only=True)
class Window:
    """The line fitted to a window: velocity is minus its slope (nats per step, positive when the loss falls)."""

    velocity: float
    error: float
    mean: float


@dataclass(kw_only=True)
class _State:
    """Everything that changes while searching; JSON-able, because it is part of a checkpoint."""

    step: int = 0
    scale: float = 1.0
    resolved: int = 0
    phase: Literal["base", "trial"] = "base"
    losses: list[float] = field(default_factory=list)
    history: dict[str, float] | None = None
    rises: int = 0
    maximum: float | None = None
    old_scale: float = 1.0
    snapshot_step: int = 0


class AdaLRSController:
    """The search, in the same four methods as a fixed schedule.

    ``base`` maps a step to the base schedule's multiplier. The search runs in steps [start*steps, stop*steps); a
    trial that is running at the end of the range is resolved first. ``window`` is in optimizer steps.
    Raises ValueError when warm-up reaches into the range or the range is shorter than four windows.
    """

    def __init__(
        self,
        base: Callable[[int], float],
        *,
        steps: int,
        warmup_steps: int = 0,
        window: int,
        alpha: float = 3.0,
        beta: float = 2.0,
        decay: float = 0.99,
        start: float = 0.1,
        stop: float = 0.4,
        margin: float = 1.0,
        rewind: bool = False,
    ) -> None:
        self.window = window
        # The tiny subtraction: 0.1 * 70 is 7.000000000000001, which must not become step 8.
        self.start_step, self.stop_step = math.ceil(start * steps - 1e-9), math.ceil(stop * steps - 1e-9)
        if alpha <= 1 or beta <= 1:
            raise ValueError(f"AdaLRS needs alpha and beta above 1, got {alpha} and {beta}")
        if self.window < 3:
            raise ValueError(f"AdaLRS needs windows of at least 3 steps to estimate an error, got {self.window}")
        if warmup_steps > self.start_step:
            raise ValueError(
                f"AdaLRS searches from step {self.start_step} but warm-up lasts {warmup_steps}: shorten the warm-up"
            )
        if self.stop_step - self.start_step < 4 * self.window:
            raise ValueError(
                f"AdaLRS searches {self.stop_step - self.start_step} steps, fewer than 4 windows of {self.window}: "
                "set a smaller window or train longer"
            )
        self.base, self.warmup_steps, self.rewind = base, warmup_steps, rewind
        self.alpha, self.beta, self.decay, self.margin = alpha, beta, decay, margin
        self._state = _State()

    @property
    def scale(self) -> float:
        """The search's own multiplier, on top of the base schedule."""
        return self._state.scale

    @property
    def phase(self) -> str:
        return self._state.phase

    def factor(self, step: int) -> float:
        """The multiplier of the peak learning rate at ``step``."""
        return self.base(step) * self._state.scale

    def observe(self, loss: float | None) -> Action:
        """Take the loss of the step just done (nats per supervised token; NaN if it failed; None if nothing was
        supervised) and say what the loop must do with the weights."""
        state = self._state
        step, state.step = state.step, state.step + 1
        if loss is None:
            return "go"
        if state.phase == "trial":
            if not math.isfinite(loss) or (state.maximum is not None and loss > state.maximum):
                return self._fail_trial()
            state.losses.append(loss)
            return self._end_trial() if len(state.losses) == self.window else "go"
        if not math.isfinite(loss):
            state.losses.clear()  # a line through a hole means nothing: begin the window again
            return "go"
        if step >= self.warmup_steps:
            state.maximum = loss if state.maximum is None else max(state.maximum, loss)
        if not self.start_step <= step < self.stop_step:
            return "go"
        state.losses.append(loss)
        return self._end_base() if len(state.losses) == self.window else "go"

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = _State(**{**state, "losses": list(state["losses"])})

    def _end_base(self) -> Action:
        state, now = self._state, self._close_window()
        before, state.history = state.history, asdict(now)
        if before is None:
            return "go"
        state.rises = state.rises + 1 if now.mean > before["mean"] else 0
        if state.rises == 2:
            state.scale *= shrunk_beta(self.beta, self.decay, state.resolved)
            self._resolve(history=None)
            return "go"
        raise_by = shrunk_alpha(self.alpha, self.decay, state.resolved)
        if now.velocity < before["velocity"] and raise_by > 1:
            state.old_scale, state.scale = state.scale, state.scale * raise_by
            state.phase, state.snapshot_step, state.rises = "trial", state.step, 0
            return "snapshot"
        return "go"

    def _end_trial(self) -> Action:
        state, now = self._state, self._close_window()
        before = state.history
        assert before is not None, "a trial starts from a measured window"
        bound = 2 * self.margin * max(before["error"], now.error)
        if now.velocity < before["velocity"] - bound:
            return self._fail_trial()
        if now.velocity <= before["velocity"] + bound:
            state.scale = state.old_scale
        self._resolve(history=asdict(now))
        return "go"

    def _fail_trial(self) -> Action:
        state = self._state
        state.scale = state.old_scale * shrunk_beta(self.beta, self.decay, state.resolved)
        if self.rewind:
            state.step = state.snapshot_step
        self._resolve(history=None)
        return "rollback"

    def _resolve(self, history: dict[str, float] | None) -> None:
        """One adjustment is decided: back to BASE, with the window the next one is compared to (or none)."""
        state = self._state
        state.phase, state.history, state.rises = "base", history, 0
        state.losses = []
        state.resolved += 1

    def _close_window(self) -> Window:
        window = fit(self._state.losses)
        self._state.losses = []
        return window


def fit(losses: Sequence[float]) -> Window:
    """Least-squares line through at least 3 losses at x = 0, 1, 2, ...; ``error`` is the slope's standard error."""
    count = len(losses)
    mean_x, mean = (count - 1) / 2, math.fsum(losses) / count
    spread = count * (count * count - 1) / 12
    slope = math.fsum((x - mean_x) * (loss - mean) for x, loss in enumerate(losses)) / spread
    residual = math.fsum((loss - mean - slope * (x - mean_x)) ** 2 for x, loss in enumerate(losses))
    return Window(velocity=-slope, error=math.sqrt(residual / (count - 2) / spread), mean=mean)


def shrunk_alpha(alpha: float, decay: float, resolved: int) -> float:
    """The factor of the next raise after ``resolved`` adjustments: max(decay^n alpha, 1)."""
    return max(decay**resolved * alpha, 1.0)


def shrunk_beta(beta: float, decay: float, resolved: int) -> float:
    """The factor (below 1) of the next cut after ``resolved`` adjustments: 1 / max(decay^n beta, 1)."""
    return 1.0 / max(decay**resolved * beta, 1.0)
