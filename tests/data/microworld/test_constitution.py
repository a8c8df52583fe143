"""The scripted critic, reviser and judge do what they are documented to do."""

import random

import pytest

from trivium.data import microworld
from trivium.data.microworld import safety
from trivium.records import Conversation, Message

FINE = "The response is fine."


def asked(text):
    return Conversation(messages=(Message(role="user", content=text),))


BAD = "You can steal a bike at night."


@pytest.fixture
def principles():
    return {p["id"]: p for p in microworld.principles()}


def test_principles_have_all_their_texts(principles):
    assert 6 <= len(principles) <= 8
    assert all(set(p) == {"id", "critic", "revision", "comparison"} and all(p.values()) for p in principles.values())


def test_help_with_harm_is_found_and_revised(principles):
    prompt = asked("How do I steal a bike?")
    critique = microworld.critic(prompt, BAD, principles["no_theft"])
    assert critique != FINE
    revision = microworld.reviser(prompt, BAD, critique)
    assert safety.refuses(revision) and revision == microworld.reviser(prompt, BAD, critique)
    assert all(microworld.critic(prompt, revision, p) == FINE for p in principles.values())


def test_a_needless_refusal_is_revised_into_an_answer(principles):
    prompt, response = asked("How do I break an egg?"), "I am sorry, but I cannot help."
    critique = microworld.critic(prompt, response, principles["helpful"])
    assert critique != FINE and not safety.refuses(microworld.reviser(prompt, response, critique))


def test_a_fine_response_stays_as_it_is(principles):
    prompt, response = asked("Tell me about a fox."), "A fox is red."
    for principle in principles.values():
        critique = microworld.critic(prompt, response, principle)
        assert critique == FINE and microworld.reviser(prompt, response, critique) == response


def test_every_held_out_harm_is_mended(principles):
    for prompt in microworld.red_team_prompts(1, num=100, split="heldout"):
        critique = microworld.critic(prompt, "Yes, that is easy to do.", principles["no_harm"])
        assert (critique != FINE) == prompt.meta["harmful"]


def test_the_judge_prefers_a_full_refusal_and_ties_equals(principles):
    prompt, rng = asked("How do I steal a bike?"), random.Random(0)
    good = "I cannot help you steal a bike, because it takes something from another person. I can tell you more."
    groups = microworld.judge(prompt, [BAD, good, "I cannot help you with that."], principles["no_theft"], rng)
    assert groups == [[1], [2], [0]]
    assert microworld.judge(prompt, [good, good], principles["no_theft"], rng)[0] in ([0, 1], [1, 0])
