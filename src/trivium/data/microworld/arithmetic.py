"""Small sums, with and without worked steps, split by their operands.

An operation `a + b` or `a - b` (in this order) is on one side of the split, in digits and in words alike; so is a
triple `a + b + c` and a sum of two two-digit numbers. The steps inside a worked answer only ever use training pairs:
in the tests of triples the parts are known and the whole is new, which is what makes the worth of steps measurable.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from trivium.data.microworld.names import Split, on_side
from trivium.data.microworld.world import NUMBERS
from trivium.records import Conversation, Message

CARRY_LIMIT = 20
"""The largest result of a pair: all of its numbers have a word."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem in digits, its result, and the steps that lead there."""

    expression: str
    result: int
    steps: tuple[str, ...]
    kind: str


@cache
def pairs(split: Split) -> tuple[tuple[int, str, int, int], ...]:
    """Return all (a, sign, b, result) of one side with b below 10 and everything within 0 to CARRY_LIMIT."""
    found = []
    for a in range(1, CARRY_LIMIT + 1):
        for b in range(1, 10):
            if a + b <= CARRY_LIMIT and on_side(split, "sum", a, "+", b):
                found.append((a, "+", b, a + b))
            if a - b >= 0 and on_side(split, "sum", a, "-", b):
                found.append((a, "-", b, a - b))
    return tuple(found)


@cache
def triples(split: Split) -> tuple[tuple[int, int, int], ...]:
    """Return all (a, b, c) of one side whose two additions are training pairs."""
    known = {(a, b) for a, sign, b, _ in pairs("train") if sign == "+"}
    small = range(1, 10)
    return tuple(
        (a, b, c)
        for a in small
        for b in small
        for c in small
        if (a, b) in known and (a + b, c) in known and on_side(split, "triple", a, b, c)
    )


@cache
def long_sums(split: Split) -> tuple[tuple[int, int], ...]:
    """Return all two-digit (a, b) of one side without carrying whose digits are training pairs."""
    known = {(a, b) for a, sign, b, _ in pairs("train") if sign == "+"}
    return tuple(
        (a, b)
        for a in range(11, 90)
        for b in range(11, 90)
        if (a % 10, b % 10) in known
        and (a // 10, b // 10) in known
        and a % 10 + b % 10 < 10
        and a // 10 + b // 10 < 10
        and on_side(split, "long", a, b)
    )


def small_sum(rng: random.Random, split: Split = "train") -> tuple[int, str, int, int]:
    """Return a random pair (a, sign, b, result) of one side."""
    return rng.choice(pairs(split))


def problem(rng: random.Random, split: Split = "train", kind: str | None = None) -> Problem:
    """Return a random problem; `kind` is `pair`, `triple` or `long` (two digits each)."""
    kind = kind or rng.choice(("pair", "pair", "triple", "triple", "long"))
    if kind == "pair":
        a, sign, b, result = small_sum(rng, split)
        return Problem(f"{a} {sign} {b}", result, (f"{a} {sign} {b} = {result}.",), kind)
    if kind == "triple":
        a, b, c = rng.choice(triples(split))
        steps = (f"{a} + {b} = {a + b}.", f"{a + b} + {c} = {a + b + c}.")
        return Problem(f"{a} + {b} + {c}", a + b + c, steps, kind)
    a, b = rng.choice(long_sums(split))
    tens, ones = a // 10 + b // 10, a % 10 + b % 10
    steps = (f"The tens: {a // 10} + {b // 10} = {tens}.", f"The ones: {a % 10} + {b % 10} = {ones}.")
    return Problem(f"{a} + {b}", a + b, steps, kind)


_DIRECT = ("What is {x}?", "How much is {x}?", "{x} = ?", "Please work out {x}.", "Can you tell me what {x} is?")
_STEPS = (" Think step by step.", " Show your steps.", " Work it out step by step.")


def question(rng: random.Random, item: Problem, *, steps: bool) -> str:
    """Return the problem as a request, which asks for steps or does not."""
    asked = rng.choice(_DIRECT).format(x=item.expression)
    return asked + rng.choice(_STEPS) if steps else asked


def direct_answer(item: Problem) -> str:
    """Return the ideal answer without steps: one short sentence."""
    return f"The answer is {item.result}."


def worked_answer(item: Problem) -> str:
    """Return the ideal answer with its steps."""
    return f"{' '.join(item.steps)} The answer is {item.result}."


def check_for(item: Problem) -> dict[str, object]:
    """Return the CHECK for the problem: the last number in the text is the result."""
    return {"kind": "number", "answer": str(item.result)}


def arithmetic_prompts(seed: int, *, num: int = 400, split: Split = "train") -> Iterator[Conversation]:
    """Yield prompts with a checkable number, half of them asking for steps; operands never cross the split."""
    rng = random.Random(f"{seed}-arithmetic-{split}")
    for _ in range(num):
        item, steps = problem(rng, split), rng.random() < 0.5
        meta = {"kind": f"arithmetic_{item.kind}", "steps": steps, "check": check_for(item)}
        text = question(rng, item, steps=steps)
        yield Conversation(messages=(Message(role="user", content=text),), source="microworld", meta=meta)


def sum_sentences(rng: random.Random) -> list[str]:
    """Return prose about sums for the documents: in words, in digits, worked, or as counting."""
    roll = rng.random()
    if roll < 0.45:
        sentences = []
        for _ in range(rng.randint(3, 5)):
            a, sign, b, result = small_sum(rng)
            if rng.random() < 0.4:
                word = "plus" if sign == "+" else "minus"
                sentences.append(f"{NUMBERS[a].capitalize()} {word} {NUMBERS[b]} is {NUMBERS[result]}.")
            else:
                sentences.append(f"{a} {sign} {b} = {result}.")
        return sentences
    if roll < 0.85:
        item = problem(rng, kind=rng.choice(("triple", "triple", "long")))
        return [f"What is {item.expression}?", *item.steps, direct_answer(item)]
    start, step = rng.randint(0, 9), rng.choice((1, 1, 2))
    row = [start + step * i for i in range(6)]
    if rng.random() < 0.5 and row[-1] <= CARRY_LIMIT:
        return [f"Count with me: {', '.join(NUMBERS[n] for n in row)}."]
    return [f"Count with me: {', '.join(map(str, row))}."]
