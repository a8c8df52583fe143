"""Answers are kept as they come, and only what is missing is asked again."""

import json

import pytest

from trivium.records import Cost
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


class Charged:
    """A run of which only the cost matters."""

    def __init__(self, tokens=0, flops=0.0):
        self.tokens, self.flops = tokens, flops

    def cost(self):
        return Cost(tokens=self.tokens, flops=self.flops)

    def spend(self, *, tokens, flops):
        self.tokens, self.flops = self.tokens + tokens, self.flops + flops


@pytest.mark.parametrize("before", [(0, 0.0), (100, 9.0)], ids=["killed", "stopped after lost work"])
def test_a_run_that_goes_on_is_charged_for_kept_answers_once_and_for_nothing_that_was_lost(tmp_path, before):
    """Two of three answers are there, at 10 and 11 tokens; the third is charged by who asks."""
    path = tmp_path / "answers.jsonl"

    def price(number):
        return 10 + number, 0.5

    def dying(asked):
        yield from [(0, "a"), (1, "b")]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        Answers(path).complete("c", list("abc"), str, dying, price)
    run = Charged(*before)
    kept = Answers(path, run)

    def ask(asked):
        for number in asked:
            run.spend(tokens=price(number)[0], flops=price(number)[1])
            yield number, "c"

    assert kept.complete("c", list("abc"), str, ask, price) == ["a", "b", "c"]
    for _ in range(2):
        kept.settle()
    assert (run.tokens, run.flops) == (10 + 11 + 12, 1.5)
