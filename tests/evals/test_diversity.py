"""How varied prompts are: n-grams counted by hand, and clusters of what was planted."""

import math
import random

import pytest

from trivium.evals import diversity
from trivium.evals.diversity import cluster_sizes, prompt_diversity


def test_distinct_ngrams_by_hand():
    """Words a b a | a b: 2 of 5 words, pairs ab ba ab: 2 of 3, triples aba: 1 of 1."""
    found = prompt_diversity(["a b a", "A b"])
    assert (found["distinct_1"], found["distinct_2"], found["distinct_3"]) == (2 / 5, 2 / 3, 1.0)


def test_planted_clusters_are_found_whatever_the_order():
    """Five kinds of question of 20 each, which differ in one word of eight (similarity 7/9), and 30 of their own."""
    rng = random.Random(4)
    vocabulary = [f"word{i}" for i in range(4000)]
    kinds = [rng.sample(vocabulary, 7) for _ in range(5)]
    texts = [" ".join([*kind, f"only{i}{n}"]) for i, kind in enumerate(kinds) for n in range(20)]
    texts += [" ".join(rng.sample(vocabulary, 8)) for _ in range(30)]
    rng.shuffle(texts)
    assert cluster_sizes(texts).tolist() == [20] * 5 + [1] * 30
    found = prompt_diversity(texts)
    assert found["clusters"] == 35 and found["largest_cluster_frac"] == 20 / 130
    entropy = -5 * (20 / 130) * math.log(20 / 130) - 30 / 130 * math.log(1 / 130)
    assert found["effective_clusters"] == pytest.approx(math.exp(entropy))


def test_copies_are_one_cluster_and_strangers_are_clusters_of_their_own():
    assert cluster_sizes(["What is 2 + 3?"] * 50).tolist() == [50]
    assert prompt_diversity(["What is 2 + 3?"] * 50)["effective_clusters"] == pytest.approx(1.0)
    strangers = [f"alpha{i} beta{i} gamma{i} delta{i}" for i in range(40)]
    assert prompt_diversity(strangers)["effective_clusters"] == pytest.approx(40.0)
    assert prompt_diversity([]) == {
        "distinct_1": 0.0,
        "distinct_2": 0.0,
        "distinct_3": 0.0,
        "clusters": 0.0,
        "effective_clusters": 0.0,
        "largest_cluster_frac": 0.0,
    }


def test_many_prompts_are_sampled_evenly(monkeypatch):
    """Of the first half copies, of the second half strangers, a sample of 10 has 5 and 5."""
    monkeypatch.setattr(diversity, "MAX_CLUSTERED", 10)
    texts = ["the same question again"] * 500 + [f"a{i} b{i} c{i} d{i}" for i in range(500)]
    assert cluster_sizes(texts).tolist() == [5, 1, 1, 1, 1, 1]
