"""Short passages about people with novel names, and questions whose answers follow from the passage.

Each maker returns a `Scene`: sentences, and questions with `hops` = the number of facts one must put together.
They feed documents (reading in plain prose), instructions (reading on request) and, with names of the other side of
the split, the tests of reasoning.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from trivium.data.microworld.arithmetic import small_sum
from trivium.data.microworld.names import Person, Split, cast, towns
from trivium.data.microworld.world import CARRIED, NUMBERS, ROOMS, THING, WORKERS, an, cap, coloured


@dataclass(frozen=True, slots=True)
class PassageQuestion:
    """A question about a passage; `word` is the short answer, `sentence` the full one."""

    text: str
    word: str
    sentence: str
    hops: int = 1


@dataclass(frozen=True, slots=True)
class Scene:
    """A passage and what can be asked about it."""

    kind: str
    sentences: tuple[str, ...]
    questions: tuple[PassageQuestion, ...]

    @property
    def text(self) -> str:
        """The passage as one paragraph."""
        return " ".join(self.sentences)


def _where(rng: random.Random, split: Split) -> Scene:
    crew, rooms = cast(rng, 3, split), rng.sample(ROOMS, 3)
    verbs = rng.choice((("is in", "is"), ("sat in", "sat"), ("waited in", "waited")))
    sentences = [f"{p.name} {verbs[0]} the {room}." for p, room in zip(crew, rooms, strict=True)]
    questions = []
    for person, room in zip(crew, rooms, strict=True):
        ask = {"is": f"Where is {person.name}?", "sat": f"Where did {person.name} sit?"}
        where = ask.get(verbs[1], f"Where did {person.name} wait?")
        questions.append(PassageQuestion(where, room, f"{person.name} {verbs[0]} the {room}."))
        who = f"Who {verbs[0]} the {room}?"
        questions.append(PassageQuestion(who, person.name, f"{person.name} {verbs[0]} the {room}."))
    return Scene("where", tuple(sentences), tuple(questions))


def _has(rng: random.Random, split: Split) -> Scene:
    crew, things = cast(rng, 3, split), rng.sample(CARRIED, 3)
    sentences, questions = [], []
    for person, thing in zip(crew, things, strict=True):
        colour, phrase = coloured(rng, thing)
        sentences.append(f"{person.name} has {an(phrase)}.")
        full = f"{person.name} has the {thing}."
        questions.append(PassageQuestion(f"Who has the {thing}?", person.name, full))
        text = f"What colour is the {thing}?"
        questions.append(PassageQuestion(text, colour, f"The {thing} is {colour}."))
        questions.append(PassageQuestion(f"What does {person.name} have?", thing, f"{person.name} has {an(phrase)}."))
    return Scene("has", tuple(sentences), tuple(questions))


def _gives(rng: random.Random, split: Split) -> Scene:
    (a, b, c), (first, second) = cast(rng, 3, split), rng.sample(CARRIED, 2)
    start = [f"{a.name} has the {first}.", f"{c.name} has the {second}."]
    rng.shuffle(start)
    verb = rng.choice(("gives", "brings", "hands"))
    link = "" if verb == "hands" else " to"
    gift = f"{a.name} hands {b.name} the {first}." if not link else f"{a.name} {verb} the {first} to {b.name}."
    questions = (
        PassageQuestion(f"Who has the {first} now?", b.name, f"{b.name} has the {first} now.", 2),
        PassageQuestion(f"Who has the {second} now?", c.name, f"{c.name} has the {second} now.", 2),
        PassageQuestion(f"Who had the {first} before?", a.name, f"{a.name} had the {first} before."),
    )
    return Scene("gives", (*start, gift), questions)


def _carries(rng: random.Random, split: Split) -> Scene:
    (a, b), (first, second), (here, there) = cast(rng, 2, split), rng.sample(CARRIED, 2), rng.sample(ROOMS, 2)
    took = rng.choice(("took", "picked up", "found"))
    went = rng.choice(("went to", "ran to", "walked to"))
    one = [f"{a.name} {took} the {first}.", f"{a.name} {went} the {here} and left it there."]
    two = [f"{b.name} {took} the {second}.", f"{b.name} {went} the {there} and left it there."]
    halves = [one, two]
    rng.shuffle(halves)
    questions = (
        PassageQuestion(f"Where is the {first}?", here, f"The {first} is in the {here}.", 2),
        PassageQuestion(f"Where is the {second}?", there, f"The {second} is in the {there}.", 2),
        PassageQuestion(f"Who took the {first}?", a.name, f"{a.name} took the {first}."),
        PassageQuestion(f"Who went to the {there}?", b.name, f"{b.name} went to the {there}."),
    )
    return Scene("carries", (*halves[0], *halves[1]), questions)


def _compares(rng: random.Random, split: Split) -> Scene:
    a, b, c = cast(rng, 3, split)
    more, most, least = rng.choice(
        (
            ("taller", "tallest", "shortest"),
            ("older", "oldest", "youngest"),
            ("faster", "fastest", "slowest"),
            ("stronger", "strongest", "weakest"),
        )
    )
    sentences = [f"{a.name} is {more} than {b.name}.", f"{b.name} is {more} than {c.name}."]
    rng.shuffle(sentences)
    questions = (
        PassageQuestion(f"Who is the {most}?", a.name, f"{a.name} is the {most}.", 2),
        PassageQuestion(f"Who is the {least}?", c.name, f"{c.name} is the {least}.", 2),
        PassageQuestion(f"Who is {more}, {c.name} or {a.name}?", a.name, f"{a.name} is {more} than {c.name}.", 2),
    )
    return Scene("compares", tuple(sentences), questions)


def _works(rng: random.Random, split: Split) -> Scene:
    crew, workers = cast(rng, 3, split), rng.sample(sorted(WORKERS), 3)
    sentences = [f"{p.name} is {an(w)}." for p, w in zip(crew, workers, strict=True)]
    questions = []
    for person, worker in zip(crew, workers, strict=True):
        does = WORKERS[worker][2]
        questions.append(PassageQuestion(f"Who {does}?", person.name, f"{person.name} {does}.", 2))
        job = f"What is the work of {person.name}?"
        questions.append(PassageQuestion(job, worker, f"{person.name} is {an(worker)}."))
    return Scene("works", tuple(sentences), tuple(questions))


def _lives(rng: random.Random, split: Split) -> Scene:
    (a, b, c), (here, there) = cast(rng, 3, split), rng.sample(towns(split), 2)
    sentences = [f"{a.name} lives in {here}.", f"{b.name} lives in {there}.", f"{c.name} lives with {a.name}."]
    rng.shuffle(sentences)
    questions = (
        PassageQuestion(f"Where does {c.name} live?", here, f"{c.name} lives in {here}.", 2),
        PassageQuestion(f"Where does {b.name} live?", there, f"{b.name} lives in {there}."),
        PassageQuestion(f"Who lives in {there}?", b.name, f"{b.name} lives in {there}."),
        PassageQuestion(f"Who lives with {a.name}?", c.name, f"{c.name} lives with {a.name}."),
    )
    return Scene("lives", tuple(sentences), questions)


_REASONS = (
    ("sad", "{she} lost {her} {thing}"), ("sad", "{her} {thing} was broken"), ("happy", "{she} found a {thing}"),
    ("happy", "{her} friend came home"), ("tired", "{she} worked all night"), ("wet", "{she} walked in the rain"),
    ("cold", "{she} forgot {her} coat"), ("proud", "{she} won the race"), ("angry", "the dog ate {her} cake"),
    ("hungry", "{she} had no breakfast"), ("late", "{she} missed the bus"), ("afraid", "{she} heard a loud noise"),
)  # fmt: skip


def _because(rng: random.Random, split: Split) -> Scene:
    sentences, questions = [], []
    for person, (mood, why) in zip(cast(rng, 2, split), rng.sample(_REASONS, 2), strict=True):
        reason = why.format(thing=rng.choice(CARRIED), **person.slots)
        sentences.append(f"{person.name} was {mood} because {reason}.")
        full = f"{person.name} was {mood} because {reason}."
        questions.append(PassageQuestion(f"Why was {person.name} {mood}?", reason, full))
        questions.append(PassageQuestion(f"Who was {mood}?", person.name, f"{person.name} was {mood}."))
    if questions[1].text == questions[3].text:
        questions = [questions[0], questions[2]]
    return Scene("because", tuple(sentences), tuple(questions))


_ACTS = (
    "washed the cup", "fed the cat", "opened the window", "wrote a letter", "baked a cake", "cleaned the floor",
    "picked some flowers", "read a book", "called a friend", "made some tea", "mended the fence", "lit the fire",
)  # fmt: skip


def _order(rng: random.Random, split: Split) -> Scene:
    person = cast(rng, 1, split)[0]
    first, second, third = rng.sample(_ACTS, 3)
    sentences = (f"First {person.name} {first}.", f"Then {person.she} {second}.", f"At last {person.she} {third}.")
    questions = tuple(
        PassageQuestion(f"What did {person.name} do {when}?", act, f"{cap(person.she)} {act}.")
        for when, act in (("first", first), ("next", second), ("last", third))
    )
    return Scene("order", sentences, questions)


def _counts(rng: random.Random, split: Split) -> Scene:
    (a, b), thing = cast(rng, 2, split), THING[rng.choice(("apple", "pear", "plum", "ball", "coin", "stone", "nut"))]
    x, sign, y, result = small_sum(rng, split)
    have, other = (NUMBERS[n] if rng.random() < 0.5 else str(n) for n in (x, y))
    items = thing.plural if x != 1 else thing.name
    sentences = (
        f"{a.name} has {have} {items}.",
        f"{b.name} gives {a.object} {other} more." if sign == "+" else f"{cap(a.she)} gives {other} to {b.name}.",
    )
    left = thing.plural if result != 1 else thing.name
    question = f"How many {thing.plural} does {a.name} have now?"
    full = f"{a.name} has {result} {left} now."
    return Scene("counts", sentences, (PassageQuestion(question, str(result), full, 2),))


MAKERS: dict[str, Callable[[random.Random, Split], Scene]] = {
    "where": _where, "has": _has, "gives": _gives, "carries": _carries, "compares": _compares, "works": _works,
    "lives": _lives, "because": _because, "order": _order, "counts": _counts,
}  # fmt: skip


def scene(rng: random.Random, split: Split = "train", kind: str | None = None) -> Scene:
    """Return a random passage with its questions; `kind` (a key of MAKERS) fixes what it is about."""
    return MAKERS[kind or rng.choice(list(MAKERS))](rng, split)


def hero(rng: random.Random, split: Split = "train") -> Person:
    """Return one person."""
    return cast(rng, 1, split)[0]
