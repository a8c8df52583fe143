"""The texts of one seed, made once for all tests of the microworld."""

import pytest

from trivium.data import microworld


@pytest.fixture(scope="session")
def documents():
    return list(microworld.documents(1, num=6000))


@pytest.fixture(scope="session")
def conversations():
    return list(microworld.instructions(1, num=6000))


@pytest.fixture(scope="session")
def items():
    return list(microworld.tests(1, num_per_task=100))


@pytest.fixture(scope="session")
def training_texts(documents, conversations):
    """Every text that any stage may train on."""
    texts = [d.text for d in documents]
    texts += [m.content for c in conversations for m in c.messages]
    for prompts in (microworld.preference_prompts, microworld.red_team_prompts, microworld.arithmetic_prompts):
        texts += [c.messages[0].content for c in prompts(1, num=1000, split="train")]
    return texts
