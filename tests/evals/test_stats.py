import math

import numpy as np
import pytest

from trivium.evals.stats import (
    correlation_interval,
    mean_interval,
    paired_bootstrap,
    ratio_interval,
    unpaired_bootstrap,
    wilson_interval,
    win_interval,
)


def test_wilson_by_hand_and_at_the_ends():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(3, 17), (50, 100), (99, 100), (1, 2)])
def test_wilson_is_scipys(successes, n):
    stats = pytest.importorskip("scipy.stats")
    reference = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson_interval(successes, n) == pytest.approx((reference.low, reference.high), abs=1e-9)


def test_wilson_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    shares = rng.uniform(0.02, 0.98, size=4000)
    ends = [wilson_interval(int(k), 60) for k in rng.binomial(60, shares)]
    assert 0.94 < np.mean([low <= p <= high for p, (low, high) in zip(shares, ends, strict=True)]) < 0.965


def test_mean_interval_by_hand():
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0])  # std 1.29099, standard error 0.64550
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - 1.26515, 2.5 + 1.26515), abs=1e-4)
    assert mean_interval([5.0])[0] == 5.0 and math.isnan(mean_interval([5.0])[1])
    assert all(math.isnan(x) for x in mean_interval([]))


def test_pairing_takes_the_items_difficulty_out():
    rng = np.random.default_rng(1)
    difficulty = rng.normal(0, 10, 100)
    ours, theirs = difficulty + 0.5 + rng.normal(0, 0.1, 100), difficulty + rng.normal(0, 0.1, 100)
    mean, low, high = paired_bootstrap(list(ours), list(theirs), seed=0)
    assert 0.4 < low < mean < high < 0.6
    _, wide_low, wide_high = unpaired_bootstrap(list(ours), list(theirs), seed=0)
    assert wide_high - wide_low > 10 * (high - low)
    with pytest.raises(ValueError, match="same items"):
        paired_bootstrap([1.0], [1.0, 2.0], 0)


def test_the_bootstrap_is_that_of_the_normal_theory_and_follows_its_seed():
    values = list(np.random.default_rng(2).normal(1.0, 2.0, 200))
    first = paired_bootstrap(values, [0.0] * 200, seed=5)
    assert first == paired_bootstrap(values, [0.0] * 200, seed=5) != paired_bootstrap(values, [0.0] * 200, seed=6)
    assert first == pytest.approx(mean_interval(values), abs=0.05)


def test_win_rate_counts_ties_as_half():
    rate, low, high = win_interval([1, 2, 3, 4], [0, 2, 4, 3], seed=0)  # win, tie, loss, win
    assert rate == pytest.approx(2.5 / 4) and 0 <= low <= rate <= high <= 1


def test_the_two_sides_of_a_win_rate_mirror():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 5, 80).tolist(), rng.integers(0, 5, 80).tolist()
    rate, low, high = win_interval(a, b, seed=1)
    other = win_interval(b, a, seed=1)
    assert (other[0], other[1], other[2]) == pytest.approx((1 - rate, 1 - high, 1 - low), abs=1e-9)


def test_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(4).normal(size=40)
    y = x + np.random.default_rng(5).normal(size=40)
    reference = stats.pearsonr(x, y)
    ends = reference.confidence_interval(0.95)
    assert correlation_interval(x, y) == pytest.approx((reference.statistic, ends.low, ends.high), abs=1e-9)
    assert math.isnan(correlation_interval([1.0] * 9, list(range(9)))[0])


def test_winning_everything_is_still_not_certain():
    assert win_interval([1.0] * 20, [0.0] * 20, seed=0) == pytest.approx((1.0, 0.8389, 1.0), abs=1e-4)
    assert win_interval([1.0] * 20, [1.0] * 20, seed=0)[0] == 0.5


def test_a_ratio_weighs_items_by_size():
    value, low, high = ratio_interval([2.0, 30.0], [1.0, 10.0], seed=0)
    assert value == pytest.approx(32 / 11) and low == pytest.approx(2.0) and high == pytest.approx(3.0)
    assert math.isnan(ratio_interval([], [], 0)[0])
