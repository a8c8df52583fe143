"""Prompts for preferences, the hidden taste, and simulated annotators who share it with noise.

The taste is the demo's ground truth: nothing in the pipeline reads it except the simulated annotators and, at the very
end, the evaluation. It is a weighted sum (WEIGHTS) of six features, each in [0, 1].
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Literal

import numpy as np

from trivium.data.microworld.corpus import documents
from trivium.data.microworld.demonstrations import instructions
from trivium.data.microworld.names import Split, all_names
from trivium.data.microworld.open_ended import known_subjects, subjects
from trivium.records import Conversation, Message

WEIGHTS: dict[str, float] = {
    "on_topic": 0.20,
    "reason": 0.25,
    "warm_closing": 0.25,
    "length": 0.20,
    "well_formed": 0.05,
    "no_repetition": 0.05,
}
IDEAL_WORDS, NO_WORDS = (25, 45), (15, 60)
"""Lengths in words that the taste likes fully, and those at which it likes nothing any more."""
_REASON = re.compile(r"\w+ \w+.* (?:because|so that) \w+ \w+ \w+", re.IGNORECASE)
_CLOSING = re.compile(
    r"(?:^|[.!?]\s+)(?:I hope |Have (?:a|fun)|Enjoy |I wish you |Take care|May (?:it|your) )[^.!?]{4,60}[.!?]\s*$"
)
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")

Rng = random.Random | np.random.Generator
"""A source of random numbers; both kinds are at home in the stages."""


@cache
def vocabulary() -> frozenset[str]:
    """Return the words of the microworld in lower case, without names: those of a fixed sample of its texts."""
    counts: Counter[str] = Counter()
    for document in documents(0, num=6000):
        if document.meta["kind"] != "planted":
            counts.update(_WORD.findall(document.text))
    for conversation in instructions(0, num=6000):
        for message in conversation.messages:
            counts.update(_WORD.findall(message.content))
    names = all_names()
    folded = {n.lower() for n in names} | {n.upper() for n in names}
    return frozenset(w.lower() for w in counts if w not in names and w not in folded)


@cache
def _subject_words() -> dict[str, str]:
    return known_subjects()


def _asked(prompt: Conversation) -> str:
    """Return the last thing that the user said."""
    return next((m.content for m in reversed(prompt.messages) if m.role == "user"), "")


def _on_topic(prompt: Conversation, words: Sequence[str]) -> float:
    known, said = _subject_words(), {w.lower() for w in words}
    wanted = {known[w] for w in (w.lower() for w in _WORD.findall(_asked(prompt))) if w in known}
    if not wanted:
        wanted = {w.lower() for w in _WORD.findall(_asked(prompt)) if len(w) > 4}
    found = {known.get(w, w) for w in said}
    return len(wanted & found) / len(wanted) if wanted else 0.5


def features(prompt: Conversation, text: str) -> dict[str, float]:
    """Return the features of the taste, each in [0, 1].

    - on_topic: the share of the subjects in the request that the response names;
    - reason: 1 if something stands before and at least three words after `because` or `so that`;
    - warm_closing: 1 if the last sentence begins like a good wish (`I hope`, `Have a`, `Enjoy`, `I wish you`, ...);
    - length: 1 from 25 to 45 words, falling to 0 at 15 and at 60 words;
    - well_formed: a third each for a capital first letter, a final mark, and the share of known words;
    - no_repetition: 1 minus the share of word triples that occurred before in the text, and 0 for an empty text.
    """
    text = text.strip()
    words = _WORD.findall(text)
    num, (low, high), (none_below, none_above) = len(words), IDEAL_WORDS, NO_WORDS
    slope = min((num - none_below) / (low - none_below), (none_above - num) / (none_above - high))
    known = sum(w.lower() in vocabulary() or w in all_names() for w in words) / num if num else 0.0
    triples = [tuple(w.lower() for w in words[i : i + 3]) for i in range(num - 2)]
    fresh = len(set(triples)) / len(triples) if triples else float(num > 0)
    return {
        "on_topic": _on_topic(prompt, words),
        "reason": float(bool(_REASON.search(text))),
        "warm_closing": float(bool(_CLOSING.search(text))),
        "length": min(1.0, max(0.0, slope)),
        "well_formed": (text[:1].isupper() + (text[-1:] in tuple(".!?")) + known) / 3,
        "no_repetition": fresh,
    }


def taste(prompt: Conversation, text: str) -> float:
    """Return how much the hidden taste likes `text` as a response, in [0, 1]: sum of WEIGHTS[f] * feature f."""
    values = features(prompt, text)
    return sum(WEIGHTS[name] * values[name] for name in WEIGHTS)


def _normal(rng: Rng) -> float:
    return rng.gauss(0.0, 1.0) if isinstance(rng, random.Random) else float(rng.normal())


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedAnnotator:
    """A program that ranks responses; never a person, and `kind` says so.

    utility = taste + noise * N(0, 1) + length_bias * words / 50 + position_bias * [shown first];
    two neighbours in the order whose utilities differ by less than `tie_margin` share a place.
    """

    name: str
    noise: float
    length_bias: float = 0.0
    position_bias: float = 0.0
    tie_margin: float = 0.02
    kind: Literal["simulated"] = "simulated"

    def utilities(self, prompt: Conversation, texts: Sequence[str], rng: Rng) -> list[float]:
        """Return the utility of each text, in the order shown."""
        result = []
        for place, text in enumerate(texts):
            value = taste(prompt, text) + self.noise * _normal(rng)
            value += self.length_bias * len(text.split()) / 50 + (self.position_bias if place == 0 else 0.0)
            result.append(value)
        return result

    def rank(self, prompt: Conversation, texts: Sequence[str], rng: Rng) -> list[list[int]]:
        """Return the indices of `texts` (given in the order shown) in groups, best first; a group is a tie."""
        values = self.utilities(prompt, texts, rng)
        order = sorted(range(len(texts)), key=lambda i: -values[i])
        groups: list[list[int]] = []
        for index in order:
            if groups and values[groups[-1][-1]] - values[index] < self.tie_margin:
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups


def annotators(seed: int) -> list[SimulatedAnnotator]:
    """Return the five simulated annotators; `seed` varies their noise by up to a tenth, never their kind of bias."""
    rng = random.Random(f"{seed}-annotators")
    table = (("sim-careful", 0.09, 0.0, 0.0), ("sim-steady", 0.12, 0.0, 0.0), ("sim-hasty", 0.18, 0.0, 0.0),
             ("sim-wordy", 0.12, 0.15, 0.0), ("sim-first", 0.12, 0.0, 0.12))  # fmt: skip
    return [
        SimulatedAnnotator(name=name, noise=noise * rng.uniform(0.9, 1.1), length_bias=length, position_bias=first)
        for name, noise, length, first in table
    ]


def preference_prompts(seed: int, *, num: int = 400, split: Split = "train") -> Iterator[Conversation]:
    """Yield open-ended prompts of one side, all different as long as there are any left."""
    pool = subjects(split)
    rng = random.Random(f"{seed}-preferences-{split}")
    order: list[int] = []
    while len(order) < num:
        order += _spread(rng, [subject.kind for _, subject in pool])
    for index in islice(order, num):
        text, subject = pool[index]
        meta = {"kind": subject.kind, "subjects": list(subject.words)}
        yield Conversation(messages=(Message(role="user", content=text),), source="microworld", meta=meta)


def _spread(rng: random.Random, kinds: Sequence[str]) -> list[int]:
    """Return all indices in a random order in which stories, the largest class, do not crowd out the rest."""
    # A story gets a later key on average: every story counts for a third of another request.
    return sorted(range(len(kinds)), key=lambda i: rng.random() ** (1 / 3 if kinds[i] == "story" else 1.0))
