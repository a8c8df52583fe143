import itertools

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from trivium.preferences.significance import (
    chi_squared_tail,
    contrast,
    holm,
    logistic,
    mean_test,
    normal_of_student,
    normal_tail,
    p_value,
    trend,
)


def test_tails_equal_scipy():
    for z in (-8.0, -1.96, 0.0, 0.3, 2.5, 7.0):
        assert normal_tail(z) == pytest.approx(scipy.stats.norm.sf(z), rel=1e-12)
        assert p_value(z) == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), rel=1e-12)
        assert p_value(z, "below") == pytest.approx(scipy.stats.norm.cdf(z), rel=1e-12)
        assert p_value(z, "above") == pytest.approx(scipy.stats.norm.sf(z), rel=1e-12)
    for degrees, x in itertools.product((1, 2, 3, 4, 7, 10, 31), (0.0, 0.1, 1.0, 5.0, 40.0)):
        assert chi_squared_tail(x, degrees) == pytest.approx(scipy.stats.chi2.sf(x, degrees), rel=1e-10)


def test_students_tail_equals_scipy_to_two_percent():
    for degrees, t in itertools.product((10, 30, 99, 300), (-4.0, -0.5, 0.0, 1.0, 2.0, 3.0, 3.5)):
        found = normal_tail(normal_of_student(t, degrees))
        assert found == pytest.approx(scipy.stats.t.sf(t, degrees), rel=0.02)
    assert normal_of_student(float("inf"), 9) == float("inf") and np.isnan(normal_of_student(float("nan"), 9))


def test_holm_by_hand():
    # 0.01 * 3; 0.03 * 2; 0.04 * 1, which may not fall below what came before.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    # Weights 3 and 1: 0.03 * 4 / 3 = 0.04; then 0.04 * 1 / 1. The other one first would need 0.04 * 4.
    assert holm([0.03, 0.04], [3.0, 1.0]) == pytest.approx([0.04, 0.04])


def test_holm_keeps_the_family_at_its_level():
    """Ten true hypotheses at once: some p is at most 0.05 in 40% of families, some corrected one in at most 5%."""
    p = np.random.default_rng(0).random((2000, 10))
    assert (p.min(axis=1) <= 0.05).mean() > 0.35
    alarms = np.mean([min(holm(row)) <= 0.05 for row in p])
    assert abs(alarms - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 2000)


def sandwich(design, outcome, clusters):
    """Return least-squares coefficients and their cluster-robust covariance, from the textbook's matrices."""
    bread = np.linalg.inv(design.T @ design)
    beta = bread @ design.T @ outcome
    meat = np.zeros_like(bread)
    names = np.unique(clusters)
    for name in names:
        score = design[clusters == name].T @ (outcome - design @ beta)[clusters == name]
        meat += np.outer(score, score)
    return beta, bread @ meat @ bread * len(names) / (len(names) - 1)


def test_contrast_is_the_cluster_robust_regression_on_a_dummy():
    rng = np.random.default_rng(3)
    clusters = rng.integers(12, size=60)
    mine = rng.random(60) < 0.3
    values = rng.normal(size=60) + 0.4 * mine + rng.normal(size=12)[clusters]
    beta, covariance = sandwich(np.stack([np.ones(60), mine], axis=1), values, clusters)
    found = contrast(values, mine, clusters)
    assert found.effect == pytest.approx(beta[1], abs=1e-12)
    assert found.z == pytest.approx(beta[1] / np.sqrt(covariance[1, 1]), abs=1e-10)
    assert found.n == mine.sum()
    alone = mean_test(values, clusters)
    beta, covariance = sandwich(np.ones((60, 1)), values, clusters)
    assert (alone.effect, alone.z) == pytest.approx((beta[0], beta[0] / np.sqrt(covariance[0, 0])), abs=1e-10)


def test_within_clusters_the_contrast_is_the_paired_t_test():
    """One value of each side in every cluster: the same statistic as scipy's, whatever the clusters share."""
    rng = np.random.default_rng(4)
    shared = 100 * rng.normal(size=40)
    first, second = shared + rng.normal(size=40), shared + 0.5 + rng.normal(size=40)
    found = contrast(np.concatenate([first, second]), np.arange(80) < 40, np.tile(np.arange(40), 2))
    assert found.z == pytest.approx(scipy.stats.ttest_rel(first, second).statistic, abs=1e-8)


def test_contrasts_of_nothing_and_of_no_variance():
    nothing = contrast(np.ones(3), np.zeros(3, dtype=bool), np.arange(3))
    assert np.isnan(nothing.p) and nothing.n == 0
    assert np.isnan(mean_test(np.zeros(5), np.arange(5)).p)
    assert mean_test(np.ones(5), np.arange(5)).p == 0
    assert np.isnan(mean_test(np.zeros(0), np.zeros(0, dtype=np.int64)).p)


def test_trend_has_the_mean_and_variance_of_all_orders():
    values = np.array([3.0, 1.0, 4.0, 1.0, 9.0])
    found = [trend(np.array(order)) for order in itertools.permutations(values)]
    assert np.mean([t.effect for t in found]) == pytest.approx(0, abs=1e-12)
    assert np.var([t.z for t in found]) == pytest.approx(1, abs=1e-12)
    assert trend(np.arange(5.0)).effect == pytest.approx(1)
    assert trend(np.arange(5.0)).effect == pytest.approx(scipy.stats.pearsonr(range(5), range(5)).statistic)
    assert np.isnan(trend(np.ones(4)).p)


def test_logistic_maximises_the_likelihood_and_has_the_sandwich():
    rng = np.random.default_rng(5)
    features = rng.normal(size=(200, 2))
    outcome = (rng.random(200) < 1 / (1 + np.exp(-features @ [0.8, -0.5]))).astype(float)
    clusters = rng.integers(30, size=200)
    found = logistic(features, outcome, clusters)

    def loss(beta):
        margin = features @ beta
        return np.logaddexp(0, margin).sum() - outcome @ margin

    best = scipy.optimize.minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9})
    assert found.converged
    assert found.coefficients == pytest.approx(best.x, abs=1e-6)
    chance = 1 / (1 + np.exp(-features @ found.coefficients))
    bread = np.linalg.inv(sum(np.outer(x, x) * p * (1 - p) for x, p in zip(features, chance, strict=True)))
    totals = [((outcome - chance)[clusters == c][:, None] * features[clusters == c]).sum(axis=0) for c in range(30)]
    meat = sum(np.outer(t, t) for t in totals)
    assert found.covariance == pytest.approx(bread @ meat @ bread * 30 / 29, rel=1e-9)
    assert found.tested(0, 200).z == pytest.approx(found.coefficients[0] / np.sqrt(found.covariance[0, 0]))


def test_logistic_says_when_it_did_not_arrive():
    features, clusters = np.array([[1.0], [2.0], [-1.0]]), np.arange(3)
    separated = logistic(features, np.array([1.0, 1.0, 0.0]), clusters)
    assert not separated.converged and np.isnan(separated.tested(0, 3).p)
    assert not logistic(np.zeros((3, 1)), np.array([1.0, 0.0, 1.0]), clusters).converged
