import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.preferences.comparisons import (
    comparisons,
    derive,
    heldout_prompts,
    majority,
    ranked_groups,
    split_by_prompt,
)
from trivium.records import Completion, Conversation, Message, Ranking


def make(*groups, prompt="p", annotator="a", **more):
    return Ranking(prompt_id=prompt, groups=tuple(map(tuple, groups)), annotator=annotator, kind="human", **more)


def test_pairs_by_hand():
    assert derive(make("a", "bc")) == [("a", "b"), ("a", "c")]
    assert derive(make("c", "a", "b")) == [("c", "a"), ("c", "b"), ("a", "b")]
    assert derive(make("abc")) == []
    assert derive(make(none_acceptable=True)) == []


@given(st.lists(st.integers(0, 4), min_size=2, max_size=8))
def test_pairs_and_groups_say_what_the_ranks_say(levels):
    names = [f"c{i}" for i in range(len(levels))]
    ranking = make(*[[n for n, v in zip(names, levels, strict=True) if v == level] for level in sorted(set(levels))])
    rank = dict(zip(names, levels, strict=True))
    expected = {(a, b) for a, b in itertools.permutations(names, 2) if rank[a] < rank[b]}
    pairs = derive(ranking)
    assert set(pairs) == expected and len(pairs) == len(expected)
    groups = ranked_groups([ranking])
    if len(set(levels)) == 1:
        assert groups == []
    else:
        (group,) = groups
        of = dict(zip(group.completion_ids, group.ranks, strict=True))
        assert {(a, b) for a, b in itertools.permutations(names, 2) if of[a] < of[b]} == expected
        assert group.num_pairs == len(expected)
        assert min(group.ranks) == 0


def test_what_completions_are_called_does_not_order_them():
    """An id hashes the policy's run; another setting of that run must not change what a reward model learns."""
    (group,) = ranked_groups([make("ca", "b")])
    (renamed,) = ranked_groups([make("xz", "y")])
    assert [dict(c="x", a="z", b="y")[name] for name in group.completion_ids] == list(renamed.completion_ids)


def test_comparison_records_carry_their_ranking():
    prompt = Conversation(messages=(Message(role="user", content="hi"),))
    a, b = (Completion(prompt_id=prompt.id, text=t) for t in "ab")
    ranking = make([a.id], [b.id], prompt=prompt.id)
    (pair,) = comparisons([ranking], {prompt.id: prompt}, {a.id: a, b.id: b})
    assert (pair.chosen, pair.rejected, pair.ranking_id) == (a, b, ranking.id)


def test_no_prompt_is_on_both_sides_and_the_split_ignores_order():
    rankings = [make("a", "b", prompt=f"p{i % 50}", annotator=f"x{i}") for i in range(200)]
    train, heldout = split_by_prompt(rankings, fraction=0.2, seed=3)
    assert {r.prompt_id for r in train} & {r.prompt_id for r in heldout} == set()
    assert len({r.prompt_id for r in heldout}) == 10 and len(heldout) == 40
    assert len(train) + len(heldout) == 200
    again = split_by_prompt(rankings[::-1], fraction=0.2, seed=3)[1]
    assert sorted(r.id for r in again) == sorted(r.id for r in heldout)
    assert heldout_prompts([f"p{i}" for i in range(50)], 0.2, 4) != heldout_prompts(
        [f"p{i}" for i in range(50)], 0.2, 3
    )


def test_small_and_impossible_splits():
    assert len(heldout_prompts(["a", "b"], 0.01, 0)) == 1
    assert len(heldout_prompts(["a", "b"], 0.99, 0)) == 1
    assert heldout_prompts(["a"], 0.5, 0) == frozenset()
    assert heldout_prompts(["a", "b"], 0.0, 0) == frozenset()
    with pytest.raises(ValueError, match="fraction"):
        heldout_prompts(["a"], 1.0, 0)


def test_a_single_tie_is_a_group_only_where_ties_are_asked_for():
    rankings = [make("ab"), make("a", "b"), make("a"), make("ab", none_acceptable=True), make(none_acceptable=True)]
    assert [g.ranks for g in ranked_groups(rankings)] == [(0, 1)]
    assert [g.ranks for g in ranked_groups(rankings, ties=True)] == [(0, 0), (0, 1)]


def test_majority_by_hand():
    votes = [make("a", "b", "c", annotator="x"), make("a", "c", "b", annotator="y"), make("b", "a", "c", annotator="z")]
    (found,) = majority(votes)
    assert found.groups == (("a",), ("b",), ("c",)) and found.annotator == "majority" and found.kind == "human"
    # Two against two on every pair: one tie. A circle of majorities: one tie, too.
    even = majority([make("a", "b"), make("b", "a", annotator="y")])
    assert even[0].groups == (("a", "b"),)
    # a over c twice, the other pairs even: a has one and a half points, b one, c a half.
    halves = majority([make("b", "a", "c"), make("a", "c", "b", annotator="y")])
    assert halves[0].groups == (("a",), ("b",), ("c",))
    circle = [make("a", "b", "c"), make("b", "c", "a", annotator="y"), make("c", "a", "b", annotator="z")]
    assert majority(circle)[0].groups == (("a", "b", "c"),)


def test_majorities_are_of_one_set_of_responses_each():
    votes = [make("a", "b"), make("c", "a", annotator="y"), make("a", "b", prompt="q"), make(none_acceptable=True)]
    assert [(r.prompt_id, r.groups) for r in majority(votes)] == [
        ("p", (("a",), ("b",))), ("p", (("c",), ("a",))), ("q", (("a",), ("b",)))
    ]  # fmt: skip
