import json

import pytest

from trivium.config import UserError
from trivium.records import Conversation, Message
from trivium.rewards.constitution import (
    DEFAULT_COMPARISON,
    Principle,
    choice_prompt,
    comparison_prompt,
    critique_prompt,
    load_constitution,
    load_principles,
    revision_prompt,
    with_examples,
)

RULE = Principle(id="kind", critic="Is it unkind?", revision="Make it kind.")
PROMPT = Conversation(messages=(Message(role="user", content="Tell me a joke."),))
ROWS = [
    {"id": "a", "critic": "c", "revision": "r"},
    {"id": "b", "critic": "c", "revision": "r", "comparison": "which?"},
]


def written_principles():
    return ROWS


def test_a_file_with_principles_or_the_list_alone(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"source": "us", "principles": ROWS}))
    (tmp_path / "two.json").write_text(json.dumps(ROWS))
    found = load_principles("one.json", base=tmp_path)
    assert [p.id for p in found] == ["a", "b"]
    assert [p.comparison for p in found] == [DEFAULT_COMPARISON, "which?"]
    assert load_principles(str(tmp_path / "two.json")) == found


def test_code_may_give_them():
    assert load_principles("trivium.data.microworld:principles")
    assert [p.id for p in load_principles(f"{__name__}:written_principles")] == ["a", "b"]
    assert [p.id for p in load_principles(f"{__name__}:ROWS")] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("{}", "no list of principles"),
        ("[]", "at least one"),
        (json.dumps([{"id": "a", "critic": "c"}]), "principle 0 has no 'revision'"),
        (json.dumps([ROWS[0], ROWS[0]]), "share an id"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_principles("bad.json", base=tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no constitution at"):
        load_principles("none.json", base=tmp_path)


def test_critique_and_revision_are_turns_of_one_talk():
    critique = critique_prompt(PROMPT, "No.", RULE)
    assert [m.content for m in critique.messages] == ["Tell me a joke.", "No.", "Is it unkind?"]
    revision = revision_prompt(PROMPT, "No.", "It is.", RULE)
    assert revision.messages[:3] == critique.messages
    assert [(m.role, m.content) for m in revision.messages[3:]] == [("assistant", "It is."), ("user", "Make it kind.")]


def test_a_comparison_shows_both_and_asks_for_one_letter():
    text = comparison_prompt(PROMPT, "first one", "second one", "Which is kinder?").messages[-1].content
    assert text.index("Tell me a joke.") < text.index("first one") < text.index("second one") < text.index("kinder")
    assert all(mark in text for mark in ("[[A]]", "[[B]]", "[[C]]"))


CHAT = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, "qacCrR", strict=True)]


def test_example_chats_come_with_the_principles(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"principles": ROWS, "few_shot_chats": [CHAT]}))
    principles, (example,) = load_constitution("c.json", base=tmp_path)
    assert [p.id for p in principles] == ["a", "b"] and [m.content for m in example] == list("qacCrR")
    for chat in (CHAT[:4], CHAT[1:] + CHAT[:1], "text", [*CHAT[:5], {"role": "assistant"}]):
        (tmp_path / "bad.json").write_text(json.dumps({"principles": ROWS, "few_shot_chats": [chat]}))
        with pytest.raises(UserError, match="few-shot chat 0 must have six turns"):
            load_constitution("bad.json", base=tmp_path)


def test_examples_stand_after_the_system_message():
    example = tuple(Message(role=m["role"], content=m["content"]) for m in CHAT)
    head = Message(role="system", content="Be kind.")
    asked = Conversation(messages=(head, *PROMPT.messages))
    shown = with_examples(asked, [example], 4, lambda _: True).messages
    assert [m.content for m in shown] == ["Be kind.", "q", "a", "c", "C", "Tell me a joke."]
    assert with_examples(asked, [example], 4, lambda _: False) == asked
    # One that is too long is passed over, a later one that fits is taken.
    long = (Message(role="user", content="x" * 99), *example[1:])
    shown = with_examples(asked, [long, example], 4, lambda c: sum(len(m.content) for m in c.messages) < 60).messages
    assert [m.content for m in shown] == ["Be kind.", "q", "a", "c", "C", "Tell me a joke."]


def test_a_choice_asks_the_same_for_a_letter():
    text = choice_prompt(PROMPT, "first one", "second one", "Which is kinder?").messages[-1].content
    assert text.index("first one") < text.index("second one") < text.index("kinder") < text.index("A or B")
    assert "[[" not in text
