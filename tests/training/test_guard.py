"""Which steps the guard passes over, by hand."""

from __future__ import annotations

import math

import pytest

from trivium.config import ConfigError, UserError
from trivium.training.guard import Guard, GuardConfig, Guards
from trivium.training.step import StepResult


def result(norm: float, skipped: bool = False) -> StepResult:
    """Return the result of a step with this gradient norm."""
    return StepResult(loss=1.0, grad_norm=norm, num_items=1.0, skipped=skipped)


def test_the_limit_is_the_factor_times_the_median_once_the_window_is_full() -> None:
    """Norms 1, 5, 3: median 3, times 2 is 6; then 9 comes in, 1 goes out: the median of 5, 3, 9 is 5, so 10."""
    guard = Guard(GuardConfig(spike_factor=2.0, window=3))
    limits = []
    for norm in (1.0, 5.0, 3.0, 9.0):
        limits.append(guard.limit)
        guard.judge(result(norm, skipped=norm > limits[-1]))
    assert limits == [math.inf, math.inf, math.inf, 6.0]
    assert guard.limit == 10.0
    assert (guard.count, guard.in_a_row) == (1, 1)


def test_off_by_default_and_what_is_not_finite_never_counts() -> None:
    """No limit without a factor; with one, NaN and infinity do not enter the median."""
    plain = Guard(GuardConfig())
    for _ in range(200):
        plain.judge(result(1.0))
    assert plain.limit == math.inf
    guard = Guard(GuardConfig(spike_factor=2.0, window=2))
    reasons = [guard.judge(result(norm, skipped=not math.isfinite(norm))) for norm in (1.0, math.nan, math.inf, 3.0)]
    assert reasons == ["", "not finite", "not finite", ""]
    assert guard.limit == 4.0


def test_one_more_than_max_skipped_in_a_row_is_the_end() -> None:
    """Two may be passed over, the third in a row stops the run; a step that counts starts the row anew."""
    guard = Guard(GuardConfig(max_skipped=2))
    for skipped in (True, True, False, True, True):
        guard.raise_if_diverged("r", guard.judge(result(math.nan if skipped else 1.0, skipped)))
    with pytest.raises(UserError, match="r: the gradient was not finite 3 steps in a row; lower the learning rate"):
        guard.raise_if_diverged("r", guard.judge(result(math.nan, skipped=True)))
    assert guard.count == 5


def test_state_brings_it_back() -> None:
    """What was restored sets the same limit and counts on."""
    guard = Guard(GuardConfig(spike_factor=3.0, window=4))
    for norm in (0.1, 0.7, 0.3, 0.2, 0.9):
        guard.judge(result(norm))
    other = Guard(guard.config)
    other.restore(guard.state())
    assert other.limit == guard.limit and other.state() == guard.state()


def test_a_factor_that_passes_over_every_second_step_is_refused() -> None:
    """Half of all norms are above the median."""
    with pytest.raises(ConfigError, match=r"spike_factor = 1.0: must be at least 1.01"):
        GuardConfig(spike_factor=1.0)


class Told:
    """A run that remembers its notices."""

    id = "r"

    def __init__(self) -> None:
        self.notices: list[tuple[str, object, int]] = []

    def notice(self, name: str, value: object, step: int) -> None:
        """Remember."""
        self.notices.append((name, value, step))


def test_a_network_that_learns_does_not_hide_one_that_has_stopped_to() -> None:
    """PPO's two networks step in turn: the policy's sixth in a row is the end, though every value step is fine."""
    run = Told()
    guards = Guards(run, ("policy", "value"))  # type: ignore[arg-type]
    for _ in range(5):
        assert guards.take("policy", result(math.nan, skipped=True), 1).skipped
        assert not guards.take("value", result(1.0), 1).skipped
    with pytest.raises(UserError, match="r: the gradient was not finite 6 steps in a row"):
        guards.take("policy", result(math.inf, skipped=True), 2)
    assert [step for _, _, step in run.notices] == [1] * 5 + [2]
    assert {value["network"] for _, value, _ in run.notices} == {"policy"}


def test_guards_count_on_after_resuming() -> None:
    """Five before the checkpoint and one after it are six; a checkpoint that has none starts anew."""
    first, second, third = (Guards(Told(), ("policy",)) for _ in range(3))  # type: ignore[arg-type]
    for _ in range(5):
        first.take("policy", result(math.nan, skipped=True), 1)
    second.restore(first.state())
    third.restore({})
    third.take("policy", result(math.nan, skipped=True), 2)
    with pytest.raises(UserError, match="6 steps in a row"):
        second.take("policy", result(math.nan, skipped=True), 2)
