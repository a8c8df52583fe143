import itertools

import numpy as np
import pytest

from trivium.preferences.reliability import FEWEST, dawid_skene, pair_votes, reliability
from trivium.records import Ranking


def make(groups, annotator, prompt="p"):
    return Ranking(prompt_id=prompt, groups=tuple(map(tuple, groups)), annotator=annotator, kind="simulated")


def oracle(votes, classes, iterations):
    """Return (truth, confusion, prior, log-likelihood) after so many EM iterations, by loops and products."""
    annotators, items = votes.shape
    truth = np.array([[sum(votes[:, i] == c) for c in range(classes)] for i in range(items)], dtype=float)
    truth /= truth.sum(axis=1, keepdims=True)
    for _ in range(iterations):
        prior = truth.sum(axis=0) / items
        confusion = np.zeros((annotators, classes, classes))
        for a, i, c in itertools.product(range(annotators), range(items), range(classes)):
            if votes[a, i] >= 0:
                confusion[a, c, votes[a, i]] += truth[i, c]
        confusion /= confusion.sum(axis=2, keepdims=True)
        joint = np.array([
            [prior[c] * np.prod([confusion[a, c, votes[a, i]] for a in range(annotators) if votes[a, i] >= 0])
             for c in range(classes)]
            for i in range(items)
        ])  # fmt: skip
        truth = joint / joint.sum(axis=1, keepdims=True)
    return truth, confusion, prior, np.log(joint.sum(axis=1)).sum()


def cast(rng, confusions, prior, items, missing=0.2):
    truth = rng.choice(len(prior), size=items, p=prior)
    votes = np.array([[rng.choice(len(prior), p=confusion[t]) for t in truth] for confusion in confusions])
    votes[rng.random(votes.shape) < missing] = -1
    votes[0][(votes >= 0).sum(axis=0) == 0] = 0
    return truth, votes


def test_the_first_step_by_hand():
    """Votes 00, 01 of two annotators: shares (1, 0), (1/2, 1/2); so prior (3/4, 1/4); the second is right on 2/3."""
    found = dawid_skene(np.array([[0, 0], [0, 1]]), 2, most_iterations=1)
    assert found.prior.tolist() == [0.75, 0.25]
    assert found.confusion[0] == pytest.approx(np.array([[1, 0], [1, 0]]))
    assert found.confusion[1] == pytest.approx(np.array([[2 / 3, 1 / 3], [0, 1]]))
    # Item 1: 3/4 * 1 * 2/3 against 1/4 * 1 * 0. Item 2: 3/4 * 1/3 against 1/4 * 1: even.
    assert found.truth == pytest.approx(np.array([[1, 0], [0.5, 0.5]]))
    assert found.log_likelihood == pytest.approx(np.log(0.5) + np.log(0.5))
    assert not found.converged


@pytest.mark.parametrize("seed", range(3))
def test_em_is_that_of_the_loops(seed):
    rng = np.random.default_rng(seed)
    confusions = [0.7 * np.eye(3) + 0.1, 0.55 * np.eye(3) + 0.15, np.full((3, 3), 1 / 3)]
    _, votes = cast(rng, confusions, [0.5, 0.3, 0.2], 40)
    for iterations in (1, 2, 7):
        truth, confusion, prior, likelihood = oracle(votes, 3, iterations)
        found = dawid_skene(votes, 3, most_iterations=iterations, tolerance=-1)
        assert found.iterations == iterations
        assert found.truth == pytest.approx(truth, abs=1e-10)
        assert found.confusion == pytest.approx(confusion, abs=1e-10)
        assert found.prior == pytest.approx(prior, abs=1e-10)
        assert found.log_likelihood == pytest.approx(likelihood, abs=1e-8)


def test_the_likelihood_never_falls_and_arrives():
    rng = np.random.default_rng(1)
    _, votes = cast(rng, [0.6 * np.eye(2) + 0.2] * 4, [0.5, 0.5], 100)
    for one_coin in (False, True):
        path = [dawid_skene(votes, 2, one_coin=one_coin, most_iterations=n, tolerance=-1) for n in range(1, 30)]
        rises = np.diff([step.log_likelihood for step in path])
        assert rises.min() > -1e-9
        found = dawid_skene(votes, 2, one_coin=one_coin)
        assert found.converged and found.log_likelihood >= path[-1].log_likelihood - 1e-6
        assert dawid_skene(votes, 2, one_coin=one_coin).truth.tolist() == found.truth.tolist()


def test_it_finds_the_accuracies_and_beats_the_majority():
    """Three good annotators against four coins: 2,000 items leave a standard error of about 0.01."""
    rng = np.random.default_rng(2)
    accuracies = [0.95, 0.9, 0.8, 0.5, 0.5, 0.5, 0.5]
    confusions = [p * np.eye(2) + (1 - p) * (1 - np.eye(2)) for p in accuracies]
    truth, votes = cast(rng, confusions, [0.5, 0.5], 2000, missing=0.0)
    found = dawid_skene(votes, 2, one_coin=True)
    assert found.accuracy == pytest.approx(accuracies, abs=0.04)
    right = (found.truth.argmax(axis=1) == truth).mean()
    majority = ((votes.sum(axis=0) > 3) == truth).mean()
    assert right > 0.93 and majority < 0.88


def test_a_contrary_annotator_is_seen_through_and_a_coin_is_no_witness():
    rng = np.random.default_rng(3)
    confusions = [p * np.eye(2) + (1 - p) * (1 - np.eye(2)) for p in (0.9, 0.9, 0.1)]
    _, votes = cast(rng, confusions, [0.5, 0.5], 1000, missing=0.0)
    assert dawid_skene(votes, 2, one_coin=True).accuracy == pytest.approx([0.9, 0.9, 0.1], abs=0.04)


def test_votes_of_pairs_by_hand():
    rankings = [make(["b", "a"], "x"), make(["a", "b"], "y"), make(["ab"], "z"), make(["c", "a"], "x")]
    annotators, votes = pair_votes(rankings)
    assert annotators == ["x", "y", "z"]
    assert votes.tolist() == [[1], [0], [-1]]  # the pair (a, c) has one witness alone


def crowd(rng, accuracies, prompts=150):
    rankings = []
    for prompt in range(prompts):
        for name, p in accuracies.items():
            order = "ab" if rng.random() < p else "ba"
            # Which response is the better one has nothing to do with the order of their ids.
            order = order if prompt % 2 else order[::-1]
            rankings.append(make([[f"{prompt}{letter}"] for letter in order], name, f"p{prompt}"))
    return rankings


def test_weights_are_twice_the_accuracy_less_one_with_mean_one():
    found = reliability(crowd(np.random.default_rng(0), {"good": 0.95, "fair": 0.8, "coin": 0.5, "contrary": 0.2}))
    signal = {name: max(0.0, 2 * one.accuracy - 1) for name, one in found.items()}
    assert sum(one.weight for one in found.values()) / 4 == pytest.approx(1)
    assert found["good"].weight / found["fair"].weight == pytest.approx(signal["good"] / signal["fair"])
    assert found["contrary"].weight == 0 and found["coin"].weight < 0.2 * found["good"].weight
    assert found["good"].accuracy == pytest.approx(0.95, abs=0.06)
    assert all(one.pairs == 150 for one in found.values())


def test_the_mean_weight_is_over_rankings_not_over_annotators():
    rankings = crowd(np.random.default_rng(1), {"a": 0.9, "b": 0.9, "c": 0.6})
    rankings += [make([[f"{n}x"], [f"{n}y"]], "c", f"alone{n}") for n in range(300)]
    found = reliability(rankings)
    mean = np.mean([found[ranking.annotator].weight for ranking in rankings])
    assert mean == pytest.approx(1)
    assert found["c"].pairs == 150


def test_few_shared_pairs_give_the_weight_of_all():
    few = crowd(np.random.default_rng(2), {"a": 0.9, "b": 0.9, "c": 0.7})
    few += [make([["0b"], ["0a"]], "new", "p0")]
    found = reliability(few)
    assert found["new"].pairs == 1 < FEWEST
    known = [found[name] for name in "abc"]
    assert min(k.weight for k in known) < found["new"].weight < max(k.weight for k in known)


def test_without_anything_shared_all_weights_are_one():
    found = reliability([make(["a", "b"], "x", "p"), make(["c", "d"], "y", "q")])
    assert {name: (one.weight, one.pairs) for name, one in found.items()} == {"x": (1, 0), "y": (1, 0)}
    assert reliability([]) == {}
