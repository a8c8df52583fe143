"""Answers are kept as they come, and only what is missing is asked again."""

import json

import pytest

from trivium.runs.answers import Answers


def shout(asked):
    """Answer each question in capitals, the last one first."""
    return ((number, asked[number].upper()) for number in reversed(asked))


def test_answers_come_back_in_the_order_of_the_questions_and_are_asked_once(tmp_path):
    seen = []

    def ask(asked):
        seen.append(dict(asked))
        return shout(asked)

    for _ in range(2):  # the second time from the file
        kept = Answers(tmp_path / "checkpoints" / "answers.jsonl")
        assert kept.complete("c", ["a", "b", "a"], str, ask) == ["A", "B", "A"]
    assert seen == [{0: "a", 1: "b", 2: "a"}]
    assert kept.complete("other", ["a"], str, ask) == ["A"]  # another purpose is another question
    assert kept.complete("c", ["a", "x", "a"], str, ask) == ["A", "X", "A"]  # one that changed is asked anew
    assert seen[1:] == [{0: "a"}, {1: "x"}]


def test_what_was_answered_before_a_failure_is_not_asked_again(tmp_path):
    """Three answers, then the server is gone: the next time the other two are asked; a None counts as an answer."""

    def dying(asked):
        for number in list(asked)[:3]:
            yield number, None if number == 1 else number
        raise ConnectionError

    path, asked_again = tmp_path / "answers.jsonl", []
    with pytest.raises(ConnectionError):
        Answers(path).complete("c", list("abcde"), str, dying)

    def rest(asked):
        asked_again.extend(asked)
        return ((number, 10 + number) for number in asked)

    assert Answers(path).complete("c", list("abcde"), str, rest) == [0, None, 2, 13, 14]
    assert asked_again == [3, 4]


@pytest.mark.parametrize("keep", [1, 10, 30])
def test_half_a_line_of_a_killed_writer_costs_that_answer_alone(tmp_path, keep):
    path = tmp_path / "answers.jsonl"
    Answers(path).complete("c", ["a", "b"], str, lambda asked: ((n, n) for n in asked))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:keep])
    again = []
    for _ in range(2):
        found = Answers(path).complete("c", ["a", "b"], str, lambda asked: ((n, again.append(n) or n) for n in asked))
        assert found == [0, 1]
    assert again == [1]
    assert [json.loads(line)["answer"] for line in path.read_text().splitlines()] == [0, 1]


def test_any_text_can_be_kept(tmp_path):
    nasty = "\ud800 \x00 é\n"
    for _ in range(2):
        assert Answers(tmp_path / "a.jsonl").complete("c", ["q"], str, lambda asked: [(0, nasty)]) == [nasty]
