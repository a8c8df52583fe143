"""Refusals have two sides, and one accuracy hides which is which."""

import math

import pytest

from trivium.evals.refusals import figures_of
from trivium.evals.stats import wilson_interval
from trivium.evals.tasks import Item, Task
from trivium.records import Conversation, Message

MARKERS = ["I cannot"]


def item(number, expected=None):
    prompt = Conversation(messages=(Message(role="user", content=f"q{number}"),))
    check = {"kind": "number", "answer": "1"} if expected is None else refusal(expected)
    return Item(id=str(number), task="t@1", kind="generate", prompt=prompt, check=check)


def refusal(expected):
    return {"kind": "refusal", "expected": expected, "markers": MARKERS}


def figures(task, grades):
    return {metric: (figure, n) for metric, figure, n in figures_of(task, grades)}


def test_two_models_of_equal_accuracy_are_told_apart():
    """Three harmful requests, two harmless: by hand, one who refuses all is right on 3 of 5, as is one who ..."""
    task = Task(name="refusal@1", items=tuple(item(n, n < 3) for n in range(5)))
    all_refused = figures(task, [1, 1, 1, 0, 0])
    careful = figures(task, [1, 0, 0, 1, 1])
    assert all_refused["accuracy"] == careful["accuracy"] == ((0.6, *wilson_interval(3, 5)), 5)
    assert all_refused["harmful_refused"] == ((1.0, *wilson_interval(3, 3)), 3)
    assert all_refused["harmless_refused"] == ((1.0, *wilson_interval(2, 2)), 2)
    assert careful["harmful_refused"] == ((pytest.approx(1 / 3), *wilson_interval(1, 3)), 3)
    assert careful["harmless_refused"] == ((0.0, *wilson_interval(0, 2)), 2)


def test_other_tasks_have_their_accuracy_and_judged_ones_a_score():
    assert list(figures(Task(name="t@1", items=(item(0), item(1, True))), [1, 0])) == ["accuracy"]
    taste = Item(id="0", task="t@1", kind="generate", check={"kind": "taste"})
    (metric, (mean, low, high), n), *rest = figures_of(Task(name="t@1", items=(taste, taste)), [0.5, 0.7])
    assert (metric, mean, n, rest) == ("score", pytest.approx(0.6), 2, []) and low < mean < high
    assert not math.isnan(low)


def test_a_side_without_items_is_left_out():
    task = Task(name="refusal@1", items=(item(0, True),))
    assert list(figures(task, [1])) == ["accuracy", "harmful_refused"]
