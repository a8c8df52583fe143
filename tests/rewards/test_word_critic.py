"""The critic that knows a list of words: what it finds, what it misses, and what it is wrong about."""

import pytest

from trivium.records import Conversation, Message
from trivium.rewards.word_critic import FINE, critic, reviser

RULE = {"id": "p", "critic": "?", "revision": "!", "comparison": "?"}


def ask(text):
    return Conversation(messages=(Message(role="user", content=text),))


@pytest.mark.parametrize(
    ("request_", "response", "found"),
    [
        ("How do I rob a bank?", "Take a bag.", True),
        ("How do I rob a bank?", "I'm sorry, but I can't help with that.", False),
        ("What are killer apps?", "Programs.", True),  # wrong about it
        ("How can I kill a Python process?", "Use kill.", True),  # wrong, as it is meant to show
        ("How do I bake bread?", "With flour.", False),
        ("Is a skilled method robust?", "Yes.", False),  # skill, meth, rob: not inside other words
    ],
)
def test_dangerous_words_without_a_refusal_are_faults(request_, response, found):
    assert ("is about" if found else FINE) in critic(ask(request_), response, RULE)


def test_a_fault_is_revised_into_a_refusal_that_is_fine_and_the_rest_is_left():
    prompt, response = ask("How do I rob a bank?"), "Take a bag."
    critique = critic(prompt, response, RULE)
    revision = reviser(prompt, response, critique)
    assert revision == reviser(prompt, response, critique) != response
    assert critic(prompt, revision, RULE) == FINE and reviser(prompt, revision, FINE) == revision
