import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.config import UserError
from trivium.records import Completion, Conversation, Message
from trivium.rewards.verifiable import check, check_reward, ended, last_number, validate

EXACT = {"kind": "exact", "answers": ["Red", "the red one"]}
REFUSAL = {"kind": "refusal", "expected": True, "markers": ["I cannot", "I will not"]}


@pytest.mark.parametrize(
    ("spec", "text", "expected"),
    [
        (EXACT, ' "red". ', True),
        (EXACT, "The  RED\none!", True),
        (EXACT, "dark red", False),
        ({"kind": "contains", "words": ["cat", "Anna"]}, "anna has a Cat.", True),
        ({"kind": "contains", "words": ["cat"]}, "A catalogue.", False),
        ({"kind": "contains", "words": ["2+2"]}, "so 2+2 is it", True),
        ({"kind": "not_contains", "words": ["cat"]}, "A catalogue.", True),
        ({"kind": "not_contains", "words": ["dog", "cat"]}, "One cat", False),
        ({"kind": "bullets", "count": 2}, "- one\n- two\n", True),
        ({"kind": "bullets", "count": 2}, "Here:\n- one\n- two", False),
        ({"kind": "bullets", "count": 2}, "- one\n- ", False),
        ({"kind": "bullets", "count": 1}, "-one", False),
        ({"kind": "words", "min": 2, "max": 3}, "two words", True),
        ({"kind": "words", "max": 3}, "these are four words", False),
        ({"kind": "words", "min": 1}, "", False),
        ({"kind": "sentences", "min": 2, "max": 2}, 'One. "Two!" ', True),
        ({"kind": "sentences", "max": 1}, "It costs 2.50 today.", True),
        ({"kind": "sentences", "min": 2}, "One. And a rest", True),
        ({"kind": "sentences", "min": 1}, "  ", False),
        ({"kind": "uppercase"}, "YES, 3!", True),
        ({"kind": "uppercase"}, "123", False),
        ({"kind": "lowercase"}, "no Way", False),
        ({"kind": "starts_with", "text": "Well,"}, " Well, yes", True),
        ({"kind": "starts_with", "text": "Well,"}, "well, yes", False),
        ({"kind": "ends_with", "text": "Bye."}, "So. Bye.\n", True),
        ({"kind": "number", "answer": "17"}, "12 + 5 = 17.", True),
        ({"kind": "number", "answer": "1200"}, "That is 1,200", True),
        ({"kind": "number", "answer": "-3"}, "It is -3", True),
        ({"kind": "number", "answer": "17"}, "17, or maybe 18", False),
        ({"kind": "number", "answer": "17"}, "no idea", False),
        ({"kind": "number", "answer": "2.5"}, "2.50 euros", True),
        ({"kind": "regex", "pattern": r"^\d{3}$"}, "123", True),
        (REFUSAL, "Sorry, i CANNOT do that", True),
        (REFUSAL, "Sure!", False),
        (REFUSAL | {"expected": False}, "Sure!", True),
        ({"kind": "all", "of": [{"kind": "words", "max": 2}, {"kind": "uppercase"}]}, "YES SIR", True),
        ({"kind": "all", "of": [{"kind": "words", "max": 2}, {"kind": "uppercase"}]}, "YES sir", False),
    ],
)
def test_each_kind(spec, text, expected):
    assert check(spec, text) is expected


@pytest.mark.parametrize(
    ("text", "number"),
    [("5-3", "3"), ("room b12", None), ("12kg", "12"), ("12 and 3,456.7!", "3,456.7"), ("(-4)", "-4"), ("1,2", "2")],
)
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "exakt", "answers": []}, "exact"),
        ({"kind": "exact"}, "answers"),
        ({"kind": "bullets", "count": True}, "count"),
        ({"kind": "words"}, "min"),
        ({"kind": "number", "answer": "many"}, "no number"),
        ({"kind": "regex", "pattern": "("}, "pattern"),
        ({"kind": "all", "of": [{"kind": "nothing"}]}, "nothing"),
        ({}, "None"),
    ],
)
def test_a_wrong_specification_is_named(spec, message):
    with pytest.raises(UserError, match=message):
        validate(spec)


def test_taste_is_valid_but_no_program_grades_it():
    validate({"kind": "taste"})
    with pytest.raises(UserError, match="judge"):
        check({"kind": "taste"}, "anything")


@given(st.text(max_size=60))
def test_no_text_crashes_a_check(text):
    for spec in (EXACT, REFUSAL, {"kind": "bullets", "count": 2}, {"kind": "sentences", "max": 3}):
        assert check(spec, text) in (True, False)
    assert check({"kind": "number", "answer": "5"}, text) in (True, False)


def test_reward_reads_the_check_of_each_prompt():
    def prompt(meta):
        return Conversation(messages=(Message(role="user", content="What is 2 + 3?"),), meta=meta)

    good, bad = (Completion(prompt_id="p", text=text) for text in ("It is 5", "It is 6"))
    spec = {"check": {"kind": "number", "answer": "5"}}
    assert check_reward([prompt(spec), prompt(spec)], [good, bad]) == [1.0, 0.0]
    with pytest.raises(UserError, match="What is 2"):
        check_reward([prompt({})], [good])


def test_what_was_cut_at_the_limit_loses_one():
    prompt = Conversation(messages=(Message(role="user", content="Say more."),))
    completions = [Completion(prompt_id=prompt.id, text="and", policy="p", finish_reason=r) for r in ("stop", "length")]
    assert ended([prompt, prompt], completions) == [0.0, -1.0]
