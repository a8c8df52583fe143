"""Critique, revision and comparison, whoever does them: what failed stands for nothing."""

import dataclasses

import pytest

from trivium.config import UserError
from trivium.records import Conversation, Message
from trivium.rewards.constitution import Principle
from trivium.rewards.review import Review, Reviewer, compare
from trivium.runs.answers import Answers

RULES = [
    Principle(id="kind", critic="Is it unkind?", revision="Make it kind."),
    Principle(id="x", critic="c", revision="r"),
]
PROMPTS = [Conversation(messages=(Message(role="user", content=text),)) for text in ("Hello.", "Good day.")]


class Script:
    """An assistant by a function of (conversation, purpose), or of the two responses that it is shown."""

    problem = "it is a script"

    def __init__(self, write=None, choose=None, room=10**6):
        self._write, self._choose, self.room, self.asked = write, choose, room, []

    def fits(self, conversation):
        return sum(len(m.content) for m in conversation.messages) <= self.room

    def price(self, number):
        return 0, 0.0

    def write(self, asked, purpose):
        self.asked += asked.values()
        yield from ((number, self._write(conversation, purpose)) for number, conversation in asked.items())

    def choose(self, asked):
        for number, (letter, _) in asked.items():
            self.asked.append(letter)
            shown = letter.messages[0].content
            parts = [shown.split(f"<response_{x}>\n")[1].split("\n</response_")[0] for x in "ab"]
            yield number, self._choose(*parts)


def reviewer(tmp_path, assistant, **options):
    return Reviewer(kept=Answers(tmp_path / "a.jsonl"), assistant=assistant, **options)


def test_the_assistant_is_asked_for_a_critique_and_then_for_a_revision_in_its_light(tmp_path):
    script = Script(lambda talk, purpose: f"{purpose}: {talk.messages[-1].content}")
    found = reviewer(tmp_path, script).review(PROMPTS, ["Hi.", "Go."], RULES, 1)
    assert found[0] == Review(principle=RULES[0], critique="3: Is it unkind?", revision="4: Make it kind.")
    asked = [[m.content for m in talk.messages] for talk in script.asked]
    assert asked[0] == ["Hello.", "Hi.", "Is it unkind?"]
    assert asked[2] == ["Hello.", "Hi.", "Is it unkind?", "3: Is it unkind?", "Make it kind."]


def test_code_takes_the_place_of_either(tmp_path):
    def critic(prompt, text, principle):
        assert principle == dataclasses.asdict(RULES[0]) or principle["id"] == "x"
        return f"{text} is bad" if text == "Go." else None

    mixed = reviewer(tmp_path, Script(lambda talk, _: talk.messages[-2].content), critic=critic)
    found = mixed.review(PROMPTS, ["Hi.", "Go."], RULES, 0)
    assert [(f.critique, f.revision) for f in found] == [(None, None), ("Go. is bad", "Go. is bad")]


def test_what_got_no_critique_is_not_revised_and_nothing_at_all_is_an_error(tmp_path):
    script = Script(lambda talk, purpose: None if talk.messages[0].content == "Hello." else f"said {purpose}")
    found = reviewer(tmp_path, script).review(PROMPTS, ["Hi.", "Go."], RULES, 0)
    assert [(f.critique, f.revision) for f in found] == [(None, None), ("said 1", "said 2")]
    assert len(script.asked) == 3
    with pytest.raises(UserError, match="none of 2 questions was answered"):
        reviewer(tmp_path / "b", Script(lambda *_: None)).review(PROMPTS, ["Hi.", "Go."], RULES, 0)


def test_examples_stand_before_the_question_as_far_as_they_fit(tmp_path):
    turns = ["q", "a", "critic?", "critique", "revise?", "better"]
    chat = tuple(Message(role=("user", "assistant")[i % 2], content=turn) for i, turn in enumerate(turns))
    script = Script(lambda *_: "ok")
    reviewer(tmp_path, script, examples=[chat, chat]).review(PROMPTS[:1], ["Hi."], RULES[:1], 0)
    critique, revision = ([m.content for m in talk.messages] for talk in script.asked)
    assert critique == turns[:4] * 2 + ["Hello.", "Hi.", "Is it unkind?"]
    assert revision == turns * 2 + ["Hello.", "Hi.", "Is it unkind?", "ok", "Make it kind."]
    for room, shown in ((39, 1), (38, 0)):  # an example has 17 characters for a critique, the question 22
        small = Script(lambda *_: "ok", room=room)
        reviewer(tmp_path / str(room), small, examples=[chat, chat]).review(PROMPTS[:1], ["Hi."], RULES[:1], 0)
        assert [m.content for m in small.asked[0].messages][: 4 * shown] == turns[:4] * shown
        assert len(small.asked[0].messages) == 4 * shown + 3


ITEMS = [(PROMPTS[0], ["aaa", "a", "aa"], "Which is longer?"), (PROMPTS[1], ["b", "bb"], "Which is longer?")]


def test_a_fair_judge_gives_an_order_and_how_sure_it_is(tmp_path):
    def longer(first, second):
        lead = len(first) - len(second)
        return (0.5 + 0.2 * lead, 0.5 - 0.2 * lead)

    counts, script = {}, Script(choose=longer)
    first, second = compare(Answers(tmp_path / "a"), script, ITEMS, counts)
    assert first.groups == [[0], [2], [1]] and second.groups == [[1], [0]]
    assert first.soft == ((0, 1, pytest.approx(0.9)), (0, 2, pytest.approx(0.7)), (1, 2, pytest.approx(0.3)))
    assert counts == {"asked": 8, "malformed": 0, "disagreed": 0} and len(script.asked) == 8
    assert all("Which is longer?" in talk.messages[0].content for talk in script.asked)


def test_a_judge_who_likes_a_place_orders_nothing_and_is_half_sure(tmp_path):
    counts = {}
    first, second = compare(Answers(tmp_path / "a"), Script(choose=lambda *_: (0.8, 0.1)), ITEMS, counts)
    assert first.groups == [[0, 1, 2]] and second.groups == [[0, 1]]
    assert [chance for _, _, chance in (*first.soft, *second.soft)] == pytest.approx([0.5] * 4)
    assert counts["disagreed"] == 4


def test_a_judge_who_does_not_answer_is_never_a_preference(tmp_path):
    """Row 53: 200 answers that hold hardly an A or a B are 200 malformed ones and no label."""
    items = [(PROMPTS[0], ["a", f"b{n}"], "?") for n in range(100)]
    counts = {}
    found = compare(Answers(tmp_path / "a"), Script(choose=lambda *_: (0.003, 0.001)), items, counts)
    assert found == [None] * 100 and counts == {"asked": 200, "malformed": 200, "disagreed": 0}


def test_a_failed_pair_takes_nothing_from_the_others(tmp_path):
    def choose(first, second):
        return None if {first, second} == {"aaa", "a"} else (0.9, 0.1) if len(first) > len(second) else (0.1, 0.9)

    (found, _) = compare(Answers(tmp_path / "a"), Script(choose=choose), ITEMS, {})
    assert [(i, j) for i, j, _ in found.soft] == [(0, 2), (1, 2)]
    assert [sorted(group) for group in found.groups] in ([[0, 1], [2]], [[2], [0, 1]], [[0, 1, 2]])
