"""The hidden taste and its simulated annotators: documented numbers hold."""

import itertools
import random
import statistics

import numpy as np
import pytest

from trivium.data import microworld
from trivium.data.microworld.open_ended import request, respond
from trivium.data.microworld.preferences import WEIGHTS, SimulatedAnnotator, features
from trivium.records import Conversation, Message


def asked(text):
    return Conversation(messages=(Message(role="user", content=text),))


FOX = asked("Tell me about a fox.")
BEST = (
    "A fox is a mammal. It lives in the forest and eats mice. Many people like it because it hunts at night. "
    "You must be quiet if you want to see one. I hope you have a lovely day!"
)


def test_weights_sum_to_one_and_a_perfect_response_gets_it_all():
    assert sum(WEIGHTS.values()) == pytest.approx(1.0)
    assert microworld.taste(FOX, BEST) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("feature", "text"),
    [
        ("on_topic", BEST.replace("A fox", "It")),
        ("reason", BEST.replace("because", "and")),
        ("warm_closing", BEST.replace("I hope you have a lovely day!", "That is all that I can tell you.")),
    ],
)
def test_losing_one_feature_costs_its_weight(feature, text):
    assert features(FOX, text)[feature] == 0
    assert microworld.taste(FOX, text) == pytest.approx(1.0 - WEIGHTS[feature], abs=0.01)


def test_length_falls_off_on_both_sides():
    word = "lovely "
    lengths = {n: features(FOX, word * n)["length"] for n in (10, 15, 20, 25, 45, 50, 60, 80)}
    assert lengths == pytest.approx({10: 0, 15: 0, 20: 0.5, 25: 1, 45: 1, 50: 2 / 3, 60: 0, 80: 0})


def test_form_and_repetition_count():
    assert features(FOX, "a fox xqzt")["well_formed"] == pytest.approx((2 / 3) / 3)
    assert features(FOX, "the fox is red " * 5)["no_repetition"] < 0.3
    assert microworld.taste(FOX, "") < 0.05
    assert features(FOX, "because because because because")["reason"] == 0


def test_taste_stays_within_zero_and_one():
    for text in ("", "!", "fox" * 500, "I hope " * 90, "\n\n", "Because so that because so that it is."):
        assert 0.0 <= microworld.taste(FOX, text) <= 1.0


def test_ideal_responses_leave_room_and_vary(conversations):
    values = [
        microworld.taste(Conversation(messages=c.messages[:-1]), c.messages[-1].content)
        for c in conversations
        if c.meta["kind"] == "open_ended"
    ]
    assert 0.45 < statistics.mean(values) < 0.58
    assert statistics.stdev(values) >= 0.15
    assert sum(v > 0.9 for v in values) > 20


def test_style_features_are_independent(conversations):
    rows = [
        features(Conversation(messages=c.messages[:-1]), c.messages[-1].content)
        for c in conversations
        if c.meta["kind"] == "open_ended"
    ]
    names = ("on_topic", "reason", "warm_closing")
    matrix = np.array([[row[name] for name in names] for row in rows])
    correlation = np.corrcoef(matrix.T)
    assert np.abs(correlation - np.eye(3)).max() < 0.1
    assert ((matrix.mean(axis=0) > 0.3) & (matrix.mean(axis=0) < 0.75)).all()


def _pairs(num):
    rng = random.Random(11)
    for _ in range(num):
        text, subject = request(rng)
        yield asked(text), [respond(rng, subject), respond(rng, subject)]


def test_annotators_agree_three_or_four_times_in_five():
    crew, rng, same = microworld.annotators(0), random.Random(12), []
    for prompt, texts in _pairs(400):
        ranks = [a.rank(prompt, texts, rng) for a in crew]
        same += [x == y for x, y in itertools.combinations(ranks, 2) if len(x) == len(y) == 2]
    assert 0.74 < statistics.mean(same) < 0.82


def test_annotators_are_simulated_and_differ_as_documented():
    crew = microworld.annotators(3)
    assert [a.kind for a in crew] == ["simulated"] * 5 and len({a.name for a in crew}) == 5
    assert sum(a.length_bias > 0 for a in crew) == 1 and sum(a.position_bias > 0 for a in crew) == 1
    assert crew == microworld.annotators(3)


def test_a_position_bias_shows_and_a_fair_annotator_has_none():
    same = "A fox is red."
    biased = SimulatedAnnotator(name="x", noise=0.1, position_bias=0.12)
    fair = SimulatedAnnotator(name="y", noise=0.1)
    rng = random.Random(13)
    wins = [sum(a.rank(FOX, [same, same], rng)[0] == [0] for _ in range(500)) / 500 for a in (biased, fair)]
    assert wins[0] > 0.65 and 0.35 < wins[1] < 0.55


def test_rank_returns_every_index_once_best_first_with_ties():
    exact = SimulatedAnnotator(name="x", noise=0.0)
    groups = exact.rank(FOX, ["No.", BEST, "No."], np.random.default_rng(0))
    assert groups == [[1], [0, 2]]


def test_prompts_differ_and_are_split():
    train = [c.messages[0].content for c in microworld.preference_prompts(0, num=400)]
    test = [c.messages[0].content for c in microworld.preference_prompts(0, num=200, split="heldout")]
    assert len(set(train)) == 400 and len(set(test)) == 200 and not set(train) & set(test)
    kinds = {c.meta["kind"] for c in microworld.preference_prompts(0, num=100)}
    assert kinds == {"animal", "place", "weather", "hobby", "thing", "worker", "story"}


def test_a_response_can_be_made_that_the_taste_loves():
    rng = random.Random(14)
    for prompt in microworld.preference_prompts(0, num=50, split="heldout"):
        _, subject = next((t, s) for t, s in _subjects("heldout") if t == prompt.messages[0].content)
        assert max(microworld.taste(prompt, respond(rng, subject, style=(True, True, True))) for _ in range(12)) > 0.9


def _subjects(split):
    from trivium.data.microworld.open_ended import subjects

    return subjects(split)
