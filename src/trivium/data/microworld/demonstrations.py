"""Instructions with their ideal responses: what the SFT stage learns from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from trivium.data.microworld import arithmetic, facts, formats, open_ended, safety
from trivium.data.microworld.passages import hero, scene
from trivium.data.microworld.world import cap
from trivium.records import Conversation, Message

Turns = list[tuple[str, str]]

_SYSTEM = (
    "You are a helpful assistant.",
    "You are kind and careful.",
    "You answer questions about a small world.",
    "You are a friendly helper who tells the truth.",
    "Be honest and helpful.",
)
_ASIDES = ("", "", "", "", "Please tell me: ", "I have a question. ", "Can you help me? ", "My child asks: ")
_SHORT = (" Answer in one word.", " Use only one word.", " Please answer with a single word.")
_READ = (
    "{p} {q}",
    "{p}\n{q}",
    "Read this: {p} {q}",
    "Read the text and answer. {p}\n{q}",
    "{q} {p}",
    "Text: {p}\nQuestion: {q}",
    "Here is a text. {p} Now tell me: {q}",
)


def _world(rng: random.Random) -> Turns:
    item = facts.world_question(rng)
    if rng.random() < 0.3 and " " not in item.word:
        return [(item.text + rng.choice(_SHORT), cap(item.word) + ".")]
    return [(rng.choice(_ASIDES) + item.text, item.sentence)]


def passage_request(rng: random.Random, text: str, question: str) -> str:
    """Return a passage and a question about it as one request, in one of several layouts."""
    return rng.choice(_READ).format(p=text, q=question)


def _reading(rng: random.Random) -> Turns:
    told = scene(rng)
    item = rng.choice(told.questions)
    if rng.random() < 0.3 and " " not in item.word:
        return [(passage_request(rng, told.text, item.text + rng.choice(_SHORT)), cap(item.word) + ".")]
    return [(passage_request(rng, told.text, item.text), item.sentence)]


def _formats(rng: random.Random) -> Turns:
    item = formats.format_request(rng)
    return [(item.prompt, item.ideal)]


def _instruction(rng: random.Random) -> Turns:
    item = formats.instruction_request(rng)
    return [(item.prompt, item.ideal)]


def _direct(rng: random.Random) -> Turns:
    item = arithmetic.problem(rng)
    return [(arithmetic.question(rng, item, steps=False), arithmetic.direct_answer(item))]


def _worked(rng: random.Random) -> Turns:
    item = arithmetic.problem(rng)
    return [(arithmetic.question(rng, item, steps=True), arithmetic.worked_answer(item))]


def _open_ended(rng: random.Random) -> Turns:
    text, subject = open_ended.request(rng)
    return [(text, open_ended.respond(rng, subject))]


def _harmful(rng: random.Random) -> Turns:
    text, ideal, _ = safety.harmful_request(rng)
    return [(text, ideal)]


def _look_alike(rng: random.Random) -> Turns:
    text, ideal, _ = safety.look_alike_request(rng)
    return [(text, ideal)]


def _two_turns(rng: random.Random) -> Turns:
    """A conversation of two turns, the second of which needs the first."""
    roll = rng.random()
    if roll < 0.5:
        told = scene(rng, kind=rng.choice(("where", "has", "works", "lives", "order", "gives")))
        first, second = rng.sample(told.questions, 2)
        return [
            (f"{told.text} {first.text}", first.sentence),
            (f"And {second.text[0].lower()}{second.text[1:]}", second.sentence),
        ]
    if roll < 0.75:
        person = hero(rng)
        name = (f"Hello, my name is {person.name}.", f"Hello, {person.name}! How can I help you?")
        item = facts.world_question(rng)
        again = ("What is my name?", f"Your name is {person.name}.")
        return [name, again] if rng.random() < 0.5 else [name, (item.text, item.sentence)]
    item = facts.world_question(rng)
    thanks = rng.choice(("Thank you!", "Thanks for your help.", "That is good to know."))
    return [(item.text, item.sentence), (thanks, rng.choice(("You are welcome!", "I am glad that I could help.")))]


def _greeting(rng: random.Random) -> Turns:
    return [
        rng.choice(
            (
                ("Hello!", "Hello! How can I help you?"),
                ("Good morning!", "Good morning! What can I do for you?"),
                ("Who are you?", "I am an assistant. I answer questions and tell little stories."),
                ("What can you do?", "I can answer questions, work out sums, write lists and tell stories."),
                ("How are you?", "I am well, thank you. How can I help you?"),
                ("Goodbye!", "Goodbye! Have a good day."),
            )
        )
    ]


KINDS: dict[str, tuple[Callable[[random.Random], Turns], int]] = {
    "world": (_world, 12),
    "reading": (_reading, 18),
    "format": (_formats, 13),
    "instruction": (_instruction, 9),
    "arithmetic": (_direct, 7),
    "arithmetic_steps": (_worked, 7),
    "open_ended": (_open_ended, 18),
    "harmful": (_harmful, 9),
    "look_alike": (_look_alike, 4),
    "two_turns": (_two_turns, 4),
    "greeting": (_greeting, 1),
}
"""Kind of request: its maker and its weight."""
SYSTEM_SHARE = 0.05


def instructions(seed: int, *, num: int = 6000, harmful: int = KINDS["harmful"][1]) -> Iterator[Conversation]:
    """Yield conversations whose last message is an ideal response; `meta["kind"]` is a key of KINDS.

    `harmful` is the weight of harmful requests, which are refused, among the kinds; 0 teaches no refusal at all.
    """
    rng = random.Random(f"{seed}-instructions")
    weighted = {name: weight for name, (_, weight) in KINDS.items()} | {"harmful": harmful}
    kinds, weights = list(KINDS), list(weighted.values())
    for _ in range(num):
        kind = rng.choices(kinds, weights)[0]
        messages = [Message(role="system", content=rng.choice(_SYSTEM))] if rng.random() < SYSTEM_SHARE else []
        for asked, answered in KINDS[kind][0](rng):
            messages += [Message(role="user", content=asked), Message(role="assistant", content=answered)]
        yield Conversation(messages=tuple(messages), source="microworld", meta={"kind": kind})
