"""Reading curves of gain over KL at one KL: between points along its root, beyond them nothing, with honest ends."""

import numpy as np
import pytest

from trivium.evals.equal_kl import at_equal_kl, at_kl, difference_at_equal_kl


def test_between_points_the_gain_is_linear_in_the_root():
    """(1, 0.7), (4, 0.9) from 0.5: half way to root 1 at 0.25, half way between roots 1 and 2 at 2.25."""
    kls, gains = [4.0, 1.0], [0.9, 0.7]  # in any order
    assert at_kl(kls, gains, 0.25, 0.5) == pytest.approx(0.6)
    assert at_kl(kls, gains, 1.0, 0.5) == pytest.approx(0.7)
    assert at_kl(kls, gains, 2.25, 0.5) == pytest.approx(0.8)
    assert at_kl(kls, gains, 4.0, 0.5) == pytest.approx(0.9)


def test_beyond_the_furthest_point_nothing_is_claimed():
    assert np.isnan(at_kl([1.0, 4.0], [0.7, 0.9], 4.01, 0.5))


def test_a_kl_estimated_below_zero_is_zero():
    assert at_kl([-0.02, 1.0], [0.5, 0.7], 0.25, 0.5) == pytest.approx(0.6)


def test_the_interval_covers_as_often_as_it_says():
    """200 data sets of 60 prompts, two strengths, gains that vary by prompt: 95% to within three standard errors.

    sqrt(0.95 * 0.05 / 200) is 0.015; a percentile bootstrap of 60 covers a little less than it says.
    """
    covered = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        base = rng.normal(0, 0.2, size=60)
        kls = np.stack([1 + rng.normal(0, 0.3, size=60), 4 + rng.normal(0, 1.0, size=60)])
        gains = np.stack([0.7 + base + rng.normal(0, 0.1, size=60), 0.9 + base + rng.normal(0, 0.1, size=60)])
        value, low, high = at_equal_kl(kls, gains, 2.25, 0.5, seed=trial)
        assert low < value < high
        covered += low <= 0.8 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_what_prompts_share_is_not_in_the_interval_of_a_difference():
    """Two methods whose gains differ by exactly 0.1 on every prompt, at KLs that do not vary: no doubt is left."""
    rng = np.random.default_rng(0)
    easy = rng.normal(0, 0.3, size=50)
    kls = np.stack([np.full(50, 1.0), np.full(50, 4.0)])
    ours, theirs = (np.stack([0.7 + easy + lead, 0.9 + easy + lead]) for lead in (0.1, 0.0))
    value, low, high = difference_at_equal_kl((kls, ours), (kls, theirs), 1.0, 0.5, seed=1)
    assert (value, low, high) == pytest.approx((0.1, 0.1, 0.1))
    _, low, high = at_equal_kl(kls, ours, 1.0, 0.5, seed=1)
    assert high - low > 0.1


def test_a_target_at_the_edge_of_what_was_reached_has_no_ends():
    """Half of the resamples do not reach the mean KL of the strongest: the value stands, without an interval."""
    rng = np.random.default_rng(0)
    kls, gains = rng.normal(2.0, 1.0, size=(1, 40)), rng.normal(0.7, 0.1, size=(1, 40))
    value, low, high = at_equal_kl(kls, gains, float(kls.mean()) - 1e-6, 0.5, seed=0)
    assert value == pytest.approx(gains.mean(), abs=1e-3) and np.isnan(low) and np.isnan(high)
    assert np.isnan(at_equal_kl(kls, gains, 9.0, 0.5, seed=0)[0])
