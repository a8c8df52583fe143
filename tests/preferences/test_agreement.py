import itertools

import krippendorff
import numpy as np
import pytest
import scipy.stats

from trivium.preferences.agreement import (
    agreement,
    alpha_interval,
    bootstrap,
    concordance,
    kendall_tau_b,
    kendall_w,
    krippendorff_alpha,
    midranks,
    ratio,
    retest,
)
from trivium.records import Ranking


def make(groups, annotator, prompt="p", kind="human"):
    return Ranking(prompt_id=prompt, groups=tuple(map(tuple, groups)), annotator=annotator, kind=kind)


def random_rankings(rng, num_prompts=30, people="xyz", k=4, missing=0.3):
    found = []
    for number in range(num_prompts):
        for person in people:
            if rng.random() < missing:
                continue
            levels = rng.integers(k, size=k)
            groups = [[f"{number}-{i}" for i in range(k) if levels[i] == level] for level in sorted(set(levels))]
            found.append(make(groups, person, f"p{number}"))
    return found


def test_midranks_by_hand():
    assert midranks(make(["a", "bc", "d"], "x")) == {"a": 1, "b": 2.5, "c": 2.5, "d": 4}


def test_alpha_of_the_published_example():
    # Krippendorff (2011): the data of section C (4 observers, 12 units), the value of section D for ranks.
    n = float("nan")
    data = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, n, n, n],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, n, 3],
            [n, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, n],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, n],
        ]
    )
    assert krippendorff_alpha(data) == pytest.approx(0.815, abs=5e-4)


@pytest.mark.parametrize("seed", range(5))
def test_alpha_equals_the_reference(seed):
    rng = np.random.default_rng(seed)
    data = rng.integers(1, 6, size=(4, 25)) / 2
    data[rng.random(data.shape) < 0.3] = np.nan
    expected = krippendorff.alpha(reliability_data=data, level_of_measurement="ordinal")
    assert krippendorff_alpha(data) == pytest.approx(expected, abs=1e-12)


def test_alpha_of_perfect_and_of_undefined():
    assert krippendorff_alpha(np.array([[1.0, 2, 3], [1, 2, 3]])) == 1
    assert np.isnan(krippendorff_alpha(np.array([[1.0, 1], [1, 1]])))


@pytest.mark.parametrize("seed", range(10))
def test_tau_b_equals_scipy(seed):
    first, second = np.random.default_rng(seed).integers(4, size=(2, 6))
    assert kendall_tau_b(first, second) == pytest.approx(scipy.stats.kendalltau(first, second).statistic, abs=1e-12)


def test_by_hand_two_annotators_one_prompt():
    # x: a > b > c.  y: a > c > b.  Pairs ab equal, ac equal, bc opposed.
    found = agreement([make("abc", "x"), make("acb", "y")])
    assert found.pairwise.value == pytest.approx(2 / 3)
    assert found.ceiling.value == pytest.approx(2 / 3)
    assert found.tau_b.value == pytest.approx(1 / 3)
    # x: a > b.  y: a = b.  No verdict in common; y's tie predicts x by coin, and y decided nothing to predict.
    tied = agreement([make("ab", "x"), make(["ab"], "y")])
    assert tied.pairwise.value == 0
    assert tied.ceiling.value == 0.5
    assert tied.tau_b is None


def test_against_references_on_random_rankings_with_ties_and_gaps():
    rankings = random_rankings(np.random.default_rng(7))
    found = agreement(rankings)
    people = sorted({r.annotator for r in rankings})
    prompts = {}
    for r in rankings:
        prompts.setdefault(r.prompt_id, {})[r.annotator] = midranks(r)
    shared = {p: by for p, by in prompts.items() if len(by) >= 2}
    taus, same, right = [], [], []
    for by in shared.values():
        for one, two in itertools.permutations(by.values(), 2):
            names = sorted(one)
            tau = scipy.stats.kendalltau([one[n] for n in names], [two[n] for n in names]).statistic
            if not np.isnan(tau):
                taus.append(tau)
            for a, b in itertools.combinations(names, 2):
                guess, truth = np.sign(one[a] - one[b]), np.sign(two[a] - two[b])
                same.append(guess == truth)
                if truth:
                    right.append(0.5 if not guess else float(guess == truth))
    assert found.tau_b.value == pytest.approx(np.mean(taus), abs=1e-12)
    assert found.pairwise.value == pytest.approx(np.mean(same), abs=1e-12)
    assert found.ceiling.value == pytest.approx(np.mean(right), abs=1e-12)
    units = [(p, n) for p, by in shared.items() for n in sorted(next(iter(by.values())))]
    data = np.array([[prompts[p].get(who, {}).get(n, np.nan) for p, n in units] for who in people])
    expected = krippendorff.alpha(reliability_data=data, level_of_measurement="ordinal")
    assert found.alpha.value == pytest.approx(expected, abs=1e-12)
    assert found.alpha.n == len(shared)
    for estimate in (found.pairwise, found.alpha, found.tau_b, found.ceiling):
        assert estimate.low < estimate.value < estimate.high


def test_chance_and_perfection():
    rng = np.random.default_rng(0)
    names = [f"c{i}" for i in range(4)]
    chance = [make([[n] for n in rng.permutation(names)], who, f"p{p}") for p in range(300) for who in "xy"]
    found = agreement(chance)
    assert abs(found.alpha.value) < 0.15 and found.alpha.low < 0 < found.alpha.high
    assert found.ceiling.low < 0.5 < found.ceiling.high
    perfect = agreement([make([[n] for n in names], who, f"p{p}") for p in range(5) for who in "xyz"])
    assert (perfect.alpha.value, perfect.pairwise.value, perfect.ceiling.low, perfect.tau_b.value) == (1, 1, 1, 1)


def test_nothing_shared_is_none_and_kinds_are_not_mixed_up():
    alone = agreement([make("ab", "x", "p"), make("ab", "y", "q"), make((), "z", "p")])
    assert alone.pairwise is None and alone.alpha is None and alone.tau_b is None and alone.ceiling is None
    same_name = agreement([make("ab", "x", kind="human"), make("ba", "x", kind="ai")])
    assert same_name.pairwise.value == 0
    assert agreement([]).alpha is None


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(60):
        wins = rng.random(80) < 0.7
        estimate = bootstrap(np.stack([wins, np.ones(80)], axis=1), ratio, seed=seed)
        covered += estimate.low <= 0.7 <= estimate.high
    assert covered >= 50


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
@pytest.mark.parametrize("seed", range(3))
def test_alpha_at_every_level_equals_the_reference(level, seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 100, size=30) * (1 if level == "interval" else 0.04)
    data = np.rint(truth + rng.normal(size=(3, 30)))
    data[rng.random(data.shape) < 0.25] = np.nan
    expected = krippendorff.alpha(reliability_data=data, level_of_measurement=level)
    assert krippendorff_alpha(data, level) == pytest.approx(expected, abs=1e-12)
    found = alpha_interval(data, level)
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert found.low < found.value < found.high and found.n == 30


def test_alpha_levels_of_the_published_example():
    # Krippendorff (2011), sections C to E: nominal 0.743, ordinal 0.815, interval 0.849.
    n = float("nan")
    data = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, n, n, n],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, n, 3],
            [n, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, n],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, n],
        ]
    )
    assert krippendorff_alpha(data, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(data, "interval") == pytest.approx(0.849, abs=5e-4)


def test_kendalls_w_by_hand():
    # Three rankings of three: sums 4, 6, 8, mean 6, S = 8; W = 12 * 8 / (9 * 24) = 4/9.
    assert kendall_w(np.array([[1.0, 2, 3], [1, 2, 3], [2, 2, 2]])) == pytest.approx(12 * 8 / (9 * 24 - 3 * 24))
    assert kendall_w(np.array([[1.0, 2, 3], [1, 3, 2], [2, 1, 3]])) == pytest.approx(4 / 9)
    assert kendall_w(np.array([[1.0, 2, 3]] * 4)) == 1
    assert np.isnan(kendall_w(np.array([[2.0, 2, 2]] * 2)))


@pytest.mark.parametrize("seed", range(5))
def test_kendalls_w_is_friedmans_statistic_and_without_ties_the_mean_spearman(seed):
    """Friedman's chi-squared is m (n - 1) W, also with ties; and W = (1 + (m - 1) mean r_s) / m."""
    rng = np.random.default_rng(seed)
    tied = np.array([scipy.stats.rankdata(row) for row in rng.integers(4, size=(5, 6))])
    friedman = scipy.stats.friedmanchisquare(*tied.T).statistic
    assert kendall_w(tied) == pytest.approx(friedman / (5 * 5), abs=1e-12)
    ranks = np.array([rng.permutation(6) + 1.0 for _ in range(5)])
    mean = np.mean([scipy.stats.spearmanr(a, b).statistic for a, b in itertools.combinations(ranks, 2)])
    assert kendall_w(ranks) == pytest.approx((1 + 4 * mean) / 5, abs=1e-12)


def test_concordance_is_the_mean_over_what_several_ranked():
    rankings = [make("abc", "x"), make("abc", "y"), make("abc", "x", "q"), make("cba", "y", "q"), make("ab", "x", "r")]
    found = concordance(rankings)
    assert found.value == pytest.approx(0.5) and found.n == 2
    assert concordance([make("ab", "x")]) is None


def test_retest_compares_everybody_with_themselves_alone():
    """x says the same twice, y turns round; that x and y contradict each other does not enter."""
    rankings = [make("ab", "x"), make("ba", "y"), make("ab", "x"), make("ab", "y")]
    assert retest(rankings).pairwise.value == 0.5
    assert retest(rankings).pairwise.n == 1  # one prompt, however many asked about it
    assert retest([make("ab", "x"), make("ba", "y")]).pairwise is None
    assert retest([make("ab", "x"), make("ab", "x", kind="ai")]).pairwise is None
    # Three times: three comparisons, of which two are alike in nothing.
    thrice = retest([make("ab", "x"), make("ab", "x"), make("ba", "x")])
    assert thrice.pairwise.value == pytest.approx(1 / 3)
