"""What follows from a judge's answers in both orders, by hand; nothing follows from an answer that is none."""

import math
import random

import pytest

from trivium.rewards.verdicts import both_orders, chance_of_a, grouped


def test_letters_are_normalised_against_each_other():
    assert chance_of_a((0.3, 0.1)) == pytest.approx(0.75)
    assert chance_of_a((1.0, 0.0)) == 1.0
    assert chance_of_a(None) is None
    assert chance_of_a((0.004, 0.004)) is None  # 99% of the answers would be something else
    assert chance_of_a((math.nan, 0.5)) is None


def test_both_orders_by_hand():
    # first is better both times: 0.8 as A, and 0.4 of A for the other one, so 0.6 for it
    assert both_orders((0.8, 0.2), (0.4, 0.6)) == (1.0, pytest.approx(0.7))
    assert both_orders((0.2, 0.8), (0.6, 0.4)) == (-1.0, pytest.approx(0.3))
    # a liking for A whatever stands there
    assert both_orders((0.9, 0.1), (0.9, 0.1)) == (0.0, pytest.approx(0.5))
    assert both_orders((0.9, 0.1), (0.7, 0.3)) == (0.0, pytest.approx(0.6))
    assert both_orders((0.5, 0.5), (0.1, 0.9)) == (0.0, pytest.approx(0.7))  # an even answer decides nothing
    assert both_orders(None, (0.1, 0.9)) is None and both_orders((0.1, 0.9), None) is None


@pytest.mark.parametrize("seed", range(5))
def test_swapping_the_responses_mirrors_outcome_and_probability(seed):
    rng = random.Random(seed)
    forward, backward = ((rng.random(), rng.random()) for _ in range(2))
    outcome, chance = both_orders(forward, backward)
    mirrored, against = both_orders(backward, forward)
    assert mirrored == -outcome and against == pytest.approx(1 - chance)


def test_groups_are_by_share_of_wins_and_a_failed_pair_is_never_ordered():
    assert grouped(3, {(0, 1): 1.0, (0, 2): 1.0, (1, 2): 0.0}) == [[0], [1, 2]]
    assert grouped(3, {(0, 1): None, (0, 2): 1.0, (1, 2): 1.0}) == [[0, 1], [2]]
    assert grouped(2, {(0, 1): None}) == [[0, 1]]
