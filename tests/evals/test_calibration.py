import math

import numpy as np
import pytest
import torch

from trivium.evals import calibration
from trivium.evals.calibration import (
    COLDEST,
    HOTTEST,
    calibration_error,
    confidences,
    cross_fitted,
    error_of,
    fit_temperature,
    honest_error,
    negative_log_likelihood,
    reliability,
    rights,
)


def log_odds(share):
    return math.log(share / (1 - share))


def test_ten_forecasts_of_nine_in_ten_of_which_seven_come_true_err_by_a_fifth():
    leads = np.array([log_odds(0.9)] * 7 + [-log_odds(0.9)] * 3)
    found = calibration_error(leads, range(10))
    assert found.value == pytest.approx(0.2, abs=1e-12)
    assert found.low <= found.value <= found.high
    # Four more at 60%, of which three come true: 10/14 * 0.2 + 4/14 * 0.15.
    more = np.concatenate([leads, [log_odds(0.61)] * 3, [-log_odds(0.61)]])
    assert calibration_error(more, range(14)).value == pytest.approx((10 * 0.2 + 4 * 0.14) / 14, abs=1e-12)


def test_which_of_two_is_called_the_first_does_not_matter():
    leads = np.random.default_rng(0).normal(size=50) * 2
    assert np.array_equal(confidences(leads), confidences(-leads))
    assert np.array_equal(rights(leads), 1 - rights(-leads))
    assert rights(np.zeros(3)).tolist() == [0.5] * 3
    assert confidences(np.array([0.0, 1e4])).tolist() == [0.5, 1.0]


def test_the_temperature_is_the_likeliest_one():
    """By hand for equal leads (sigmoid(d / T) = share right), and against a scan and torch's optimum for others."""
    leads = np.array([4.0] * 3 + [-4.0])
    assert fit_temperature(leads) == pytest.approx(4 / math.log(3), rel=1e-9)
    leads = np.random.default_rng(1).normal(0.8, 3.0, size=200)
    found = fit_temperature(leads)
    best = negative_log_likelihood(leads, found)
    assert all(best <= negative_log_likelihood(leads, found * factor) for factor in (0.5, 0.99, 1.01, 2.0))
    sharpness = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [sharpness], max_iter=300, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        loss = torch.nn.functional.softplus(-torch.from_numpy(leads) * sharpness).mean()
        loss.backward()
        return loss

    solver.step(closure)
    assert found == pytest.approx(1 / sharpness.item(), rel=1e-5)


def test_a_temperature_stays_finite_where_all_is_right_or_worse_than_chance():
    assert fit_temperature(np.array([1.0, 2.0])) == pytest.approx(COLDEST)
    assert fit_temperature(np.array([-1.0, 0.5])) == pytest.approx(HOTTEST)
    assert fit_temperature(np.array([])) == fit_temperature(np.zeros(3)) == 1.0
    assert math.isfinite(fit_temperature(np.array([1e6, -1e6])))


def test_overconfident_leads_are_mended_and_honest_ones_left_alone():
    """Outcomes drawn from sigmoid(x), leads stated three times too large: T is about 3 and the error falls to noise."""
    rng = np.random.default_rng(2)
    truth = rng.normal(0, 1.5, size=4000)
    won = np.where(rng.random(4000) < 1 / (1 + np.exp(-truth)), truth, -truth)
    stated, prompts = 3 * won, list(range(4000))
    mended = cross_fitted(stated, prompts, seed=0)
    before, after = calibration_error(stated, prompts), calibration_error(stated, prompts, mended)
    # A tenth: the standard error of a temperature from 2,000 pairs is about 4%.
    assert np.unique(mended) == pytest.approx([3, 3], rel=0.1)
    assert before.low > 0.1
    assert after.value < 2 * honest_error(stated, mended)
    assert fit_temperature(won) == pytest.approx(1, rel=0.1)


def test_no_prompt_is_judged_with_a_temperature_that_has_seen_it():
    """Each half's temperature is the other half's fit; changing a prompt's leads leaves its own temperature alone."""
    rng = np.random.default_rng(3)
    leads, prompts = rng.normal(0.5, 2, size=60), [number // 3 for number in range(60)]
    before = cross_fitted(leads, prompts, seed=5)
    assert len(np.unique(before)) == 2
    assert all(len({before[i] for i in range(60) if prompts[i] == p}) == 1 for p in range(20))
    changed = leads.copy()
    changed[:3] *= -7
    after = cross_fitted(changed, prompts, seed=5)
    assert np.array_equal(before == before[0], after == before[0])
    assert (after != before).sum() == (before != before[0]).sum()
    half = before == before[0]
    assert before[0] == fit_temperature(leads[~half])


def test_few_pairs_err_even_when_honest_and_many_hardly():
    few, many = (honest_error(np.full(n, 1.0), seed=1) for n in (10, 10_000))
    assert few > 0.05 and many < 0.01
    assert math.isnan(honest_error(np.array([])))


def test_a_table_holds_every_pair_once():
    leads = np.random.default_rng(4).normal(size=100) * 5
    stated = confidences(leads)
    table = reliability(stated, rights(leads))
    assert table.sum(axis=0) == pytest.approx([100, stated.sum(), rights(leads).sum()])
    assert reliability(np.array([0.5, 1.0]), np.ones(2))[[0, -1], 0].tolist() == [1, 1]
    assert math.isnan(error_of(np.zeros((calibration.BINS, 3))))
    assert sum(row["pairs"] for row in calibration.as_rows(table)) == 100
    assert calibration_error(np.array([]), []) is None
