"""Requests whose fulfilment a program can check: about the form of the answer, or about doing exactly what was asked.

Every request comes with an ideal response that passes its check, and every combination (three birds, this word and
that one) is on one side of the split.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trivium.data.microworld.facts import animal_sentences, world_question
from trivium.data.microworld.names import Split, on_side, pick_allowed, towns
from trivium.data.microworld.passages import hero, scene
from trivium.data.microworld.world import (
    ADJECTIVES,
    ANIMALS,
    CARRIED,
    GROUPS,
    KIND_FACTS,
    NUMBERS,
    Animal,
    an,
    cap,
    described,
    listing,
)

Check = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """A request, an ideal response and the CHECK that tells whether a response fulfils it."""

    kind: str
    prompt: str
    ideal: str
    check: Check


def _sentence(rng: random.Random, split: Split) -> str:
    """Return a short sentence with a name of the given side."""
    person, thing = hero(rng, split), rng.choice(CARRIED)
    patterns = ("{0} has {1}.", "{0} found {1}.", "{0} lost {1}.", "{0} bought {1}.", "{0} wants {1}.")
    return rng.choice(patterns).format(person.name, an(described(rng, thing)))


def _about(rng: random.Random, animal: Animal, num: int) -> list[str]:
    """Return `num` sentences about an animal."""
    return [animal_sentences(rng, animal)[0], *animal_sentences(rng, animal)[1:num]]


def _one_word(rng: random.Random, split: Split) -> Request:
    """A question about a passage or the world, to be answered in one word."""
    if rng.random() < 0.5 or split == "heldout":
        told = scene(rng, split, rng.choice(("where", "has", "works", "lives", "compares", "gives")))
        item = rng.choice([q for q in told.questions if " " not in q.word])
        text, word = f"{told.text} {item.text}", item.word
    else:
        question = world_question(rng)
        while " " in question.word:
            question = world_question(rng)
        text, word = question.text, question.word
    how = rng.choice((" Answer in one word.", " Use only one word.", " Please answer with a single word."))
    return Request("one_word", text + how, cap(word) + ".", {"kind": "words", "min": 1, "max": 1})


def _group_size(rng: random.Random, split: Split, form: str) -> tuple[str, int]:
    """Return a group of the world and how many of it are asked for, a combination of the given side."""
    options = [(g, n) for g in sorted(GROUPS) for n in (2, 3, 4) if len(GROUPS[g]) >= n]
    return pick_allowed(rng, options, split, form)


def _bullets(rng: random.Random, split: Split) -> Request:
    group, num = _group_size(rng, split, "bullets")
    wordings = (
        "List {n} {g}. Use bullets.",
        "Give me {n} {g} as a list with bullets.",
        "Name {n} {g}, one per line, with bullets.",
    )
    text = rng.choice(wordings).format(n=NUMBERS[num], g=group)
    ideal = "\n".join(f"- {word}" for word in rng.sample(GROUPS[group], num))
    return Request("bullets", text, ideal, {"kind": "bullets", "count": num})


def _comma_list(rng: random.Random, split: Split) -> Request:
    group, num = _group_size(rng, split, "commas")
    wordings = (
        "Name {n} {g} with commas between them.",
        "List {n} {g} in one line, with commas.",
        "Give {n} {g} as a comma list.",
    )
    text = rng.choice(wordings).format(n=NUMBERS[num], g=group)
    pattern = rf"^\s*[A-Za-z ]+(, [A-Za-z ]+){{{num - 1}}}\.?\s*$"
    ideal = cap(", ".join(rng.sample(GROUPS[group], num))) + "."
    return Request("comma_list", text, ideal, {"kind": "regex", "pattern": pattern})


def _case(rng: random.Random, split: Split) -> Request:
    upper, sentence = rng.random() < 0.5, _sentence(rng, split)
    name = "upper case" if upper else "lower case"
    wordings = ("Write this in {c}: {s}", "Put this sentence in {c}: {s}", "Say this again in {c}. {s}")
    text = rng.choice(wordings).format(c=name, s=sentence)
    ideal = sentence.upper() if upper else sentence.lower()
    kind = "uppercase" if upper else "lowercase"
    check = {"kind": "all", "of": [{"kind": kind}, {"kind": "exact", "answers": [sentence]}]}
    return Request(kind, text, ideal, check)


def _starts(rng: random.Random, split: Split) -> Request:
    options = [(a, w) for a in ANIMALS for w in ("Well", "Yes", "Look", "Listen", "Oh")]
    animal, word = rng.choice([(a, w) for a, w in options if on_side(split, "starts", a.name, w)])
    wordings = ("Tell me about {x}. Start with the word {w}.", "Begin with {w} and tell me about {x}.")
    text = rng.choice(wordings).format(x=an(animal.name), w=word)
    first, *rest = _about(rng, animal, rng.randint(1, 3))
    ideal = " ".join([f"{word}, {first[0].lower()}{first[1:]}", *rest])
    return Request("starts_with", text, ideal, {"kind": "starts_with", "text": word})


def _ends(rng: random.Random, split: Split) -> Request:
    options = [(a, w) for a in ANIMALS for w in ("Thank you.", "That is all.", "Goodbye.", "The end.")]
    animal, end = rng.choice([(a, w) for a, w in options if on_side(split, "ends", a.name, w)])
    wordings = ("Tell me about {x}. End with the words: {w}", "Tell me about {x} and finish with: {w}")
    text = rng.choice(wordings).format(x=an(animal.name), w=end)
    ideal = " ".join([*_about(rng, animal, rng.randint(1, 3)), end])
    return Request("ends_with", text, ideal, {"kind": "ends_with", "text": end})


def _sentences(rng: random.Random, split: Split) -> Request:
    options = [(a, n) for a in ANIMALS for n in (1, 2, 3)]
    animal, num = rng.choice([(a, n) for a, n in options if on_side(split, "sentences", a.name, n)])
    unit = "sentence" if num == 1 else "sentences"
    wordings = (
        "Tell me about {x} in exactly {n} {u}.",
        "Describe {x} in {n} {u}.",
        "Use exactly {n} {u} to tell me about {x}.",
    )
    text = rng.choice(wordings).format(x=an(animal.name), n=NUMBERS[num], u=unit)
    return Request("sentences", text, " ".join(_about(rng, animal, num)), {"kind": "sentences", "min": num, "max": num})


def _use_words(rng: random.Random, split: Split) -> Request:
    options = [(t, a) for t in CARRIED for a in ADJECTIVES if on_side(split, "adjective", t, a)]
    thing, adjective = rng.choice(options)
    person = hero(rng, split)
    wordings = ("Write one sentence with the words {a} and {t}.", "Use the words {a} and {t} in one sentence.")
    text = rng.choice(wordings).format(a=adjective, t=thing)
    ideal = f"{person.name} has {an(adjective)} {thing}." if rng.random() < 0.5 else f"The {thing} is {adjective}."
    check = {
        "kind": "all",
        "of": [{"kind": "contains", "words": [adjective, thing]}, {"kind": "sentences", "min": 1, "max": 1}],
    }
    return Request("use_words", text, ideal, check)


def _say_times(rng: random.Random, split: Split) -> Request:
    word, num = hero(rng, split).name if rng.random() < 0.5 else rng.choice(towns(split)), rng.choice((2, 3))
    times = "twice" if num == 2 else "three times"
    wordings = ("Say the word {w} {t}.", "Write {w} {t}.", "Please repeat the name {w} {t}.")
    text = rng.choice(wordings).format(w=word, t=times)
    return Request("say_times", text, " ".join([word] * num), {"kind": "exact", "answers": [" ".join([word] * num)]})


def _greeting(rng: random.Random, split: Split) -> Request:
    person, town = hero(rng, split), rng.choice(towns(split))
    what, ideal, words = rng.choice(
        (
            ("Say good morning to {n}.", "Good morning, {n}!", ["good", "morning"]),
            ("Say goodbye to {n}.", "Goodbye, {n}!", ["goodbye"]),
            ("Thank {n} for the help.", "Thank you for your help, {n}!", ["thank"]),
            ("Welcome {n} to {t}.", "Welcome to {t}, {n}!", ["welcome", town]),
            ("Ask {n} about the weather in {t}.", "How is the weather in {t}, {n}?", ["weather", town]),
            ("Wish {n} a happy birthday.", "Happy birthday, {n}!", ["happy", "birthday"]),
        )
    )
    check = {"kind": "contains", "words": [*words, person.name]}
    return Request("greeting", what.format(n=person.name, t=town), ideal.format(n=person.name, t=town), check)


def _copy(rng: random.Random, split: Split) -> Request:
    sentence = _sentence(rng, split)
    wordings = ("Repeat this sentence: {s}", "Say exactly this: {s}", "Copy this: {s}")
    return Request("copy", rng.choice(wordings).format(s=sentence), sentence, {"kind": "exact", "answers": [sentence]})


def _replace(rng: random.Random, split: Split) -> Request:
    sentence, new = _sentence(rng, split), hero(rng, split).name
    old = sentence.split()[0]
    wordings = ("Write {n} instead of {o}: {s}", "Change the name {o} to {n}: {s}")
    ideal = sentence.replace(old, new, 1)
    text = rng.choice(wordings).format(n=new, o=old, s=sentence)
    return Request("replace", text, ideal, {"kind": "exact", "answers": [ideal]})


def _pick(rng: random.Random, split: Split) -> Request:
    kind = rng.choice(sorted(KIND_FACTS))
    right = [a for a in ANIMALS if a.kind == kind]
    wrong = [a for a in ANIMALS if a.kind != kind]
    while True:
        one, others = rng.choice(right), rng.sample(wrong, 2)
        if on_side(split, "pick", *sorted(a.name for a in (one, *others))):
            break
    names = [a.name for a in (one, *others)]
    rng.shuffle(names)
    asked = f"{', '.join(an(n) for n in names[:2])} or {an(names[2])}"
    text = rng.choice(("Which of these is {k}: {a}?", "Which one is {k}, {a}?")).format(k=an(kind), a=asked)
    unwanted = [n for n in names if n != one.name]
    check = {
        "kind": "all",
        "of": [{"kind": "contains", "words": [one.name]}, {"kind": "not_contains", "words": unwanted}],
    }
    return Request("pick", text, f"{cap(an(one.name))} is {an(kind)}.", check)


def _but_not(rng: random.Random, split: Split) -> Request:
    options = [(g, w) for g in ("fruits", "birds", "tools", "kinds of clothes", "insects") for w in GROUPS[g]]
    group, unwanted = pick_allowed(rng, options, split, "but_not")
    members = [w for w in GROUPS[group] if w != unwanted]
    text = rng.choice(("Name two {g}, but not {u}.", "Tell me two {g}. Do not say {u}.")).format(g=group, u=unwanted)
    either = "|".join(map(re.escape, members))
    pattern = rf"(?i)\b({either})\b[\s\S]*\b({either})\b"
    check = {
        "kind": "all",
        "of": [{"kind": "not_contains", "words": [unwanted]}, {"kind": "regex", "pattern": pattern}],
    }
    return Request("but_not", text, cap(listing(rng.sample(members, 2))) + ".", check)


FORMAT: tuple[Callable[[random.Random, Split], Request], ...] = (
    _one_word, _bullets, _bullets, _comma_list, _case, _case, _starts, _ends, _sentences,
)  # fmt: skip
"""Requests about the form of the answer."""
INSTRUCTION: tuple[Callable[[random.Random, Split], Request], ...] = (
    _use_words, _say_times, _greeting, _copy, _replace, _pick, _but_not,
)  # fmt: skip
"""Requests to do exactly one thing."""


def format_request(rng: random.Random, split: Split = "train") -> Request:
    """Return a request about the form of the answer."""
    return rng.choice(FORMAT)(rng, split)


def instruction_request(rng: random.Random, split: Split = "train") -> Request:
    """Return a request to do exactly what is said."""
    return rng.choice(INSTRUCTION)(rng, split)
