"""Duplicates: exact after normalising, near by estimate, and never on both sides of a split."""

import random

import pytest

from trivium.data.dedup import NearDuplicates, assign_sides, content_key, ngram_hashes, similarity, word_hashes

VOCABULARY = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "en", "ill", "or", "ust", "ay", "im")]


def essay(seed, length=200):
    rng = random.Random(seed)
    return [rng.choice(VOCABULARY) for _ in range(length)]


def test_exact_duplicates_ignore_case_space_and_unicode_form():
    assert content_key("Café  au\tlait\n") == content_key("CAFE\u0301 au lait") == content_key("café au lait")
    assert content_key("café au lait") != content_key("cafe au lait")


def test_ngrams_know_their_order():
    words = word_hashes("one two three one two three")
    grams = ngram_hashes(words, 3)
    assert len(grams) == 4 and grams[0] == grams[3] and len(set(grams.tolist())) == 3
    assert len(ngram_hashes(words, 7)) == 0
    assert word_hashes("One, TWO!").tolist() == word_hashes("one two").tolist()


@pytest.mark.parametrize("changed", [0, 4, 12, 30])
def test_the_estimate_is_near_the_exact_similarity(changed):
    errors = []
    for seed in range(20):
        words = essay(seed)
        other = list(words)
        for i in random.Random(seed).sample(range(len(words)), changed):
            other[i] = "changed"
        near = NearDuplicates(0.0)
        estimate = float((near.signature(" ".join(words)) == near.signature(" ".join(other))).mean())
        errors.append(estimate - similarity(" ".join(words), " ".join(other)))
    # One estimate has a standard error of at most sqrt(0.25 / 128) = 0.044; the mean of 20 a fifth of it.
    assert abs(sum(errors) / len(errors)) < 0.03
    assert max(map(abs, errors)) < 0.2


def test_near_duplicates_are_found_and_strangers_are_not():
    near = NearDuplicates(0.7)
    texts = [" ".join(essay(seed)) for seed in range(200)]
    for text in texts:
        assert near.add(text)[1] == []
    for number, text in enumerate(texts):
        found = near.add("Home and contact. " + text + " Subscribe now.")[1]
        assert [other for other, _ in found] == [number]
    assert all(near.group(number) == near.group(number + 200) for number in range(200))
    assert len({near.group(number) for number in range(400)}) == 200


def test_short_texts_do_not_fail():
    near = NearDuplicates(0.7)
    assert [near.add(text)[1] for text in ("", "...", "one", "one two")] == [[]] * 4
    assert near.add("one two")[1] == [(3, 1.0)]


def test_sides_follow_the_text_and_keep_groups_together():
    ids = [f"id{i}" for i in range(2000)]
    groups = [i // 2 for i in range(2000)]
    sides = assign_sides(groups, ids, 0.1)
    assert all(sides[i] == sides[i + 1] for i in range(0, 2000, 2))
    assert 0.07 < sum(sides) / 2000 < 0.13
    # Independent of order and of what else is there.
    order = list(range(2000))
    random.Random(0).shuffle(order)
    shuffled = assign_sides([groups[i] for i in order], [ids[i] for i in order], 0.1)
    assert [sides[i] for i in order] == shuffled
    assert assign_sides(groups[:1000], ids[:1000], 0.1) == sides[:1000]


def test_both_sides_get_something():
    assert sorted(assign_sides([0, 1], ["a", "b"], 0.0001)) == [False, True]
    assert sorted(assign_sides([0, 1], ["a", "b"], 0.9999)) == [False, True]
    assert assign_sides([0], ["a"], 0.5) in ([False], [True])
