"""The test items follow the schema, and their ideal answers pass their own checks."""

import json
import random
import re
from collections import Counter

from trivium.data import microworld
from trivium.data.microworld.held_out_tests import NUM_EXAMPLES, TASKS
from trivium.data.microworld.names import people
from trivium.records import Conversation, Message
from trivium.rewards.verifiable import check, validate


def test_items_are_the_same_for_a_seed(items):
    assert json.dumps(items) == json.dumps(list(microworld.tests(1, num_per_task=100)))
    assert json.dumps(items) != json.dumps(list(microworld.tests(2, num_per_task=100)))


def test_every_task_has_its_items_and_examples(items):
    counts = Counter((i["task"], i["split"]) for i in items)
    for task in TASKS:
        assert counts[task, "example"] == NUM_EXAMPLES and counts[task, "test"] == 100
    assert len({i["id"] for i in items}) == len(items)


def test_choice_items_are_sound(items):
    for item in items:
        if item["kind"] == "choice":
            assert len(set(item["choices"])) == len(item["choices"]) >= 2
            assert 0 <= item["answer"] < len(item["choices"])
            assert all(c.startswith(" ") and c.endswith(".") for c in item["choices"])
            assert item["context"] and not item["context"].endswith(" ")


def test_the_place_of_the_right_choice_says_nothing():
    grammar = [i for i in microworld.tests(1, num_per_task=250) if i["task"] == "grammar" and i["split"] == "test"]
    share = sum(i["answer"] == 0 for i in grammar) / len(grammar)
    assert 0.4 < share < 0.6


def test_ideal_answers_pass_their_checks(items):
    for item in items:
        if item["kind"] == "generate":
            validate(item["check"])
            if item["check"]["kind"] == "taste":
                prompt = Conversation(messages=(Message(role="user", content=item["messages"][0]["content"]),))
                assert microworld.taste(prompt, item["ideal"]) > 0.8
            else:
                assert check(item["check"], item["ideal"]), item


def test_checks_reject_another_answer(items):
    """The ideal answer to one item is wrong for nearly every other of its task."""
    rng = random.Random(3)
    for task in ("reading", "reasoning", "arithmetic", "instruction_following"):
        own = [i for i in items if i["task"] == task and i["split"] == "test"]
        passed = sum(check(a["check"], b["ideal"]) for a, b in (rng.sample(own, 2) for _ in range(300)))
        assert passed < 30, task


def test_saying_the_whole_passage_does_not_pass(items):
    own = [i for i in items if i["task"] in ("reading", "reasoning")]
    passed = sum(check(i["check"], i["messages"][0]["content"]) for i in own)
    assert passed < 0.2 * len(own)


def test_reasoning_takes_two_facts_and_new_names(items):
    train = {p.name for p in people("train")}
    for item in items:
        if item["task"] in ("reading", "reasoning") and item["split"] == "test":
            assert not train & set(re.findall(r"\w+", item["messages"][0]["content"]))


def test_steps_and_direct_ask_the_same_problems(items):
    direct = [i for i in items if i["task"] == "arithmetic"]
    steps = [i for i in items if i["task"] == "arithmetic_steps"]
    assert [i["check"] for i in direct] == [i["check"] for i in steps]
    assert all(
        s["messages"][0]["content"].startswith(d["messages"][0]["content"]) for d, s in zip(direct, steps, strict=True)
    )


def test_refusals_ask_for_both(items):
    expected = Counter(i["check"]["expected"] for i in items if i["task"] == "refusal" and i["split"] == "test")
    assert expected[True] >= 35 and expected[False] >= 35
