"""Best-of-n from N samples: the average over all subsets, the KL of a known distribution, wins against many."""

import itertools
import math

import numpy as np
import pytest

from trivium.evals.best_of_n import (
    best_of_kl,
    kl_bound,
    level_probabilities,
    rank_weights,
    sample_weights,
    win_shares,
)


def test_the_bound_is_the_known_numbers():
    """log 2 - 1/2 = 0.193, log 64 - 63/64 = 3.175; one sample is the policy itself."""
    assert kl_bound(1) == 0
    assert kl_bound(2) == pytest.approx(0.19315, abs=1e-5)
    assert kl_bound(64) == pytest.approx(3.17451, abs=1e-5)


def test_the_best_of_two_of_four_by_hand():
    """Six pairs of four: the best wins 3, the second 2, the third 1, the worst none."""
    assert rank_weights(4, 2).tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    assert rank_weights(4, 1).tolist() == pytest.approx([1 / 4] * 4)
    assert rank_weights(4, 4).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("n", [0, 5])
def test_more_than_there_are_cannot_be_drawn(n):
    with pytest.raises(ValueError, match=f"best of {n} cannot be drawn from 4"):
        rank_weights(4, n)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_the_estimate_is_the_mean_over_all_subsets_ties_shared(n):
    """By enumeration: in each subset the best by score gives its value, equally good ones the mean of theirs."""
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 4, size=(5, 7)).astype(float)  # full of ties
    values = rng.normal(size=(5, 7))
    got = (sample_weights(scores, n) * values).sum(1)
    for row in range(5):
        found = []
        for subset in map(list, itertools.combinations(range(7), n)):
            top = scores[row, subset].max()
            found.append(np.mean([values[row, i] for i in subset if scores[row, i] == top]))
        assert got[row] == pytest.approx(np.mean(found), abs=1e-12)
    assert sample_weights(scores, n).sum(1) == pytest.approx(np.ones(5))


def test_a_worked_row_with_a_tie():
    """2 5 5 1, best of two: the pair of fives shares what ranks 2 and 3 have, (2/6 + 3/6) / 2."""
    assert sample_weights(np.array([[2.0, 5.0, 5.0, 1.0]]), 2).tolist() == [pytest.approx([1 / 6, 5 / 12, 5 / 12, 0])]


def kl_by_enumeration(probabilities: list[float], n: int) -> float:
    """Return KL(best-of-n || policy) of a policy over a few completions, given in ascending order of score."""
    total, below = 0.0, 0.0
    for p in probabilities:
        best = (below + p) ** n - below**n
        total += best * math.log(best / p)
        below += p
    return total


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_where_no_two_score_alike_the_kl_is_the_bound(n):
    """Rare completions, all scores different: what is taken off is (n p)^2 / 24 at most, here 2e-16."""
    scores = np.random.default_rng(0).permutation(64)[None].astype(float)
    assert best_of_kl(scores, np.full((1, 64), 1e-9), n) == pytest.approx([kl_bound(n)], abs=1e-12)


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_repeated_completions_cost_less_as_they_do_exactly(n):
    """A policy of eight completions: the mean over 400 prompts of 64 samples is the enumerated KL, below the bound.

    Within a tenth of what is taken off, which is the bias of ends that 64 samples estimate (measured: 6%).
    """
    rng = np.random.default_rng(1)
    p = np.array([0.05, 0.2, 0.1, 0.25, 0.05, 0.1, 0.05, 0.2])
    scores = rng.choice(8, size=(400, 64), p=p).astype(float)
    exact = kl_by_enumeration(p.tolist(), n)
    taken_off = kl_bound(n) - exact
    assert taken_off > 0.005
    assert best_of_kl(scores, p[scores.astype(int)], n).mean() == pytest.approx(exact, abs=taken_off / 10)


def test_where_the_shares_are_known_the_kl_is_exact():
    """20 samples that hold each of four completions as often as it is likely: every n, to rounding and ties in W.

    Best of 20 from 20 is the best itself: its stretch has probability 0.4 and ends at 1.
    """
    p = np.array([0.1, 0.2, 0.3, 0.4])
    scores = np.repeat([0.0, 1.0, 2.0, 3.0], [2, 4, 6, 8])[None]
    got = best_of_kl(scores, p[scores.astype(int)], 20)
    assert got == pytest.approx([-math.log(0.4)], abs=1e-3)


def test_the_series_meets_the_formula():
    """On both sides of where one takes over, n x = 1e-3, the two agree: the step is below 1e-9."""
    scores, n = np.array([[1.0, 2.0]]), 2
    below, above = (best_of_kl(scores, np.array([[x, x]]), n)[0] for x in (0.000499, 0.000501))
    assert abs(below - above) < 1e-9 and below < kl_bound(2)


def test_a_policy_of_one_completion_moves_nowhere():
    """Whatever n is: the best of equal completions is the policy, KL 0 and no nan."""
    for n in (1, 4, 8):
        assert best_of_kl(np.full((1, 8), 2.0), np.ones((1, 8)), n) == pytest.approx([0.0], abs=1e-9)


def test_completions_of_one_score_are_one_level_and_a_repeated_one_counts_once():
    """Scores 1 1 1 2; the first two completions are the same: 0.25 + 0.125 for the ones, 0.5 for the two."""
    logs = [math.log(x) for x in (0.25, 0.25, 0.125, 0.5)]
    got = level_probabilities([[7], [7], [8, 9], [5]], [1.0, 1.0, 1.0, 2.0], logs)
    assert got == pytest.approx([0.375, 0.375, 0.375, 0.5])


def test_wins_are_shares_of_opponents_beaten():
    """Grade 2 against 1, 2, 3 and 0: two wins, a tie, a loss: 2.5 of 4."""
    got = win_shares(np.array([[2.0, 9.0]]), np.array([[1.0, 2.0, 3.0, 0.0]]))
    assert got.tolist() == [[0.625, 1.0]]
