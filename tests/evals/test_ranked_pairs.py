import math

import numpy as np
import pytest

from trivium.data.collate import PreferenceGroup
from trivium.evals.ranked_pairs import (
    accuracy,
    by_disagreement,
    by_length,
    clustered_share,
    gain_over_length,
    length_correlation,
    length_only,
    length_rule,
    measure,
    scored_pairs,
)
from trivium.evals.stats import wilson_interval


def group(prompt, lengths, ranks=None):
    return PreferenceGroup(
        prompt_ids=[1, prompt],
        completion_ids=[[9] * n for n in lengths],
        ranks=list(range(len(lengths))) if ranks is None else ranks,
    )


GROUPS = [group(5, [10, 20, 4]), group(6, [10, 10], [1, 0]), group(5, [3, 30], [0, 0]), group(7, [100, 95])]
SCORES = [3.0, 1.0, 2.0, 0.5, 0.25, 9.0, -9.0, 1.0, 4.0]


def test_pairs_by_hand():
    """Prompt one: 10 over 20 (+2), 10 over 4 (+1), 20 over 4 (-1); two: second over first (-0.25); a tie; four -3."""
    pairs = scored_pairs(GROUPS, SCORES)
    assert pairs.leads.tolist() == [2.0, 1.0, -1.0, -0.25, -3.0]
    assert pairs.chosen.tolist() == [10, 10, 20, 10, 100]
    assert pairs.rejected.tolist() == [20, 4, 4, 10, 95]
    assert pairs.prompts.tolist() == [0, 0, 0, 1, 2]
    assert pairs.difference.tolist() == pytest.approx([-0.5, 0.6, 0.8, 0.0, 0.05])
    assert (accuracy(pairs).value, accuracy(pairs).n) == (0.4, 5)
    shares = {name: (figure.n, figure.value) for name, figure in by_length(pairs).items() if figure.n}
    assert shares == {"shorter": (1, 1.0), "matched": (2, 0.0), "much longer": (2, 0.5)}
    with pytest.raises(ValueError, match="8 scores for 9"):
        scored_pairs(GROUPS, SCORES[:-1])


def test_swapping_chosen_and_rejected_negates_every_lead_and_every_length():
    """Row 33: what was right is wrong, and the bins are mirrored."""
    swapped = [
        PreferenceGroup(prompt_ids=g.prompt_ids, completion_ids=g.completion_ids, ranks=[-r for r in g.ranks])
        for g in GROUPS
    ]
    pairs, back = scored_pairs(GROUPS, SCORES), scored_pairs(swapped, SCORES)
    assert sorted(back.leads) == sorted(-pairs.leads)
    assert sorted(back.difference) == pytest.approx(sorted(-pairs.difference))
    assert accuracy(back).value == 1 - accuracy(pairs).value
    assert by_length(back)["shorter"].n == 0 and by_length(back)["longer"].n == 1
    assert length_rule(pairs) == -length_rule(back) == 1


def test_a_prompt_keeps_its_name_when_it_was_cut():
    long = PreferenceGroup(prompt_ids=[1, 2, 3], completion_ids=[[4], [5]], ranks=[0, 1], prompt_id="p")
    short = PreferenceGroup(prompt_ids=[1, 3], completion_ids=[[4, 4], [5]], ranks=[0, 1], prompt_id="p")
    assert scored_pairs([long, short], [0.0] * 4).prompts.tolist() == [0, 0]


def test_every_length_is_in_one_bin():
    rng = np.random.default_rng(0)
    groups = [group(n, rng.integers(1, 60, size=2).tolist()) for n in range(300)]
    pairs = scored_pairs(groups, rng.normal(size=600).tolist())
    assert sum(figure.n for figure in by_length(pairs).values()) == len(pairs) == 300


def test_copies_of_an_item_add_no_certainty():
    """k copies each: the interval of the originals; all in clusters of one: Wilson's own; nothing below n."""
    hits = (np.random.default_rng(1).random(40) < 0.7).astype(float)
    alone = clustered_share(hits, np.arange(40))
    assert (alone.low, alone.high) == pytest.approx(wilson_interval(hits.sum(), 40))
    copied = clustered_share(np.repeat(hits, 6), np.repeat(np.arange(40), 6))
    assert copied[:3] == pytest.approx(alone[:3])
    assert copied.n == 240
    opposed = clustered_share(np.array([1.0, 0.0] * 20), np.repeat(np.arange(20), 2))
    assert (opposed.low, opposed.high) == pytest.approx(wilson_interval(20, 40))
    perfect = clustered_share(np.ones(60), np.repeat(np.arange(10), 6))
    assert (perfect.low, perfect.high) == pytest.approx(wilson_interval(10, 10))
    assert math.isnan(clustered_share(np.array([]), np.array([])).value)


def test_the_interval_covers_as_often_as_it_says_where_prompts_differ():
    """400 draws of 60 prompts with 6 pairs each, a prompt's share uniform: 95% cover 1/2; Wilson's on n do not."""
    rng = np.random.default_rng(2)
    covered = naive = 0
    for _ in range(400):
        hits = (rng.random((60, 6)) < rng.random((60, 1))).astype(float).ravel()
        found = clustered_share(hits, np.repeat(np.arange(60), 6))
        low, high = wilson_interval(hits.sum(), 360)
        covered += found.low <= 0.5 <= found.high
        naive += low <= 0.5 <= high
    # Standard error of the share: 0.011.
    assert 0.91 < covered / 400 < 0.98
    assert naive / 400 < 0.85


def test_the_length_rule_follows_the_training_pairs_and_equal_lengths_count_half():
    longer = scored_pairs([group(1, [9, 5]), group(2, [8, 5]), group(3, [1, 5])], [0.0] * 6)
    shorter = scored_pairs([group(1, [5, 9])], [0.0] * 2)
    assert (length_rule(longer), length_rule(shorter)) == (1, -1)
    pairs = scored_pairs(GROUPS, SCORES)
    assert length_only(pairs, 1).tolist() == [0, 1, 1, 0.5, 1]
    assert length_only(pairs, -1).tolist() == [1, 0, 0, 0.5, 0]


def test_a_score_that_is_the_length_gains_nothing_over_length_and_correlates_fully():
    rng = np.random.default_rng(3)
    groups = [group(n, rng.choice(50, size=3, replace=False).tolist()) for n in range(40)]
    lengths = [len(ids) for g in groups for ids in g.completion_ids]
    same = scored_pairs(groups, [float(n) for n in lengths])
    assert gain_over_length(same, 1, seed=0)[:3] == (0, 0, 0)
    # A constant of each prompt changes no preference and no correlation.
    moved = scored_pairs(groups, [n + 100.0 * (i // 3) for i, n in enumerate(lengths)])
    for pairs in (same, moved):
        assert length_correlation(pairs, seed=0)[:3] == pytest.approx((1, 1, 1))
    noise = scored_pairs(groups, rng.normal(size=120).tolist())
    # Two of a prompt's three deviations are free: a standard error of 80 ** -0.5 = 0.11.
    assert abs(length_correlation(noise, seed=0).value) < 0.34


def test_the_gain_is_the_difference_of_both_accuracies():
    pairs = scored_pairs(GROUPS, SCORES)
    gain = gain_over_length(pairs, 1, seed=0)
    assert gain.value == pytest.approx(accuracy(pairs).value - length_only(pairs, 1).mean())
    assert gain.low <= gain.value <= gain.high


def test_all_measures_of_a_model_that_states_half_of_its_leads():
    """The temperature on held-out pairs, the rule from the training pairs, and every figure with its interval."""
    rng = np.random.default_rng(4)
    groups = [group(n, rng.integers(5, 40, size=2).tolist()) for n in range(600)]
    truth = rng.normal(0, 1.5, size=600)
    won = np.where(rng.random(600) < 1 / (1 + np.exp(-truth)), truth, -truth)
    heldout = scored_pairs(groups, [x for lead in won for x in (lead / 4, -lead / 4)])
    train = scored_pairs([group(1, [3, 9])], [0.0, 0.0])
    found = measure(train, heldout, seed=0)
    assert found.temperature == pytest.approx(0.5, rel=0.25)
    assert found.facts["length_rule"] == "shorter"
    assert all(figure.low <= figure.value <= figure.high for figure in found.figures.values())
    assert found.figures["calibration@1", "ece_after"].value < found.figures["calibration@1", "ece_before"].value
    assert found.facts["calibration_after"]["nll"] < found.facts["calibration_before"]["nll"]
    rule = found.figures["length_only_accuracy@1", "accuracy"]
    assert rule.value == pytest.approx(length_only(heldout, -1).mean())
    none = measure(train, scored_pairs([group(1, [3, 3], [0, 0])], [0.0, 0.0]), seed=0)
    assert not any(key[0].startswith("pairwise") for key in none.figures)


def test_a_spread_that_foretells_errors_shows_in_the_two_halves():
    """Members who differ by a lot exactly where the mean is wrong: all right in one half, none in the other."""
    right = np.array([True, False] * 10)
    leads = np.where(right, 1.0, -1.0) + np.array([[-1.0], [0.0], [1.0]]) * np.where(right, 0.1, 5.0)
    scores = [x for lead in leads.mean(0) for x in (lead, 0.0)]
    found = by_disagreement(scored_pairs([group(n, [3, 4]) for n in range(20)], scores), leads)
    assert (found["members"], found["agreeing"]["value"], found["disagreeing"]["value"]) == (3, 1.0, 0.0)
    assert found["mean_spread"] == pytest.approx((0.1 + 5) / 2)
