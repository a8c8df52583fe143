"""Names of people and towns, split once and for all into those for training and those for tests.

A name is two syllables from the lists below, so a tokenizer that has seen the training names can spell the test names.
The split is a hash of the name alone: it never depends on a seed, and no name is ever on both sides.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

Split = Literal["train", "heldout"]
T = TypeVar("T")

TEST_PERCENT = 20
"""Of names and of every kind of combination, this share (in percent) is kept out of all training text."""

_FIRST = ("Ba Be Da De Fi Ga Ha Jo Ka Ke La Li Lu Ma Mi Na Ni Pe Ra Ro Sa Si Ta Ti To Va Vi Wi Ya Ze").split()
_HER_ENDINGS = ("na", "la", "ra", "mi", "lie", "sa", "nia", "ssy")
_HIS_ENDINGS = ("bo", "ton", "dan", "rik", "mel", "vin", "lo", "gus")
_TOWN_FIRST = "Ald Ash Bram Cran Dun Elm Fern Grey Har Kir Lin Mill Oak Pen Ros Stan Thorn Wil".split()
_TOWN_LAST = ("bury", "by", "dale", "ford", "ham", "ley", "mere", "port", "ton", "wick")
_TAKEN = {"Mami", "Nana", "Papa", "Sassy", "Missy", "Lassy", "Mara", "Lilo", "Zera", "Kelo", "Galo", "Halo", "Hara"}


@dataclass(frozen=True, slots=True)
class Person:
    """A person of the microworld with the pronouns that go with the name's ending."""

    name: str
    she: str
    her: str
    object: str

    @property
    def slots(self) -> dict[str, str]:
        """The words that templates ask for: {name}, {she}, {She}, {her} (possessive), {Her}, {him} (object)."""
        return {
            "name": self.name,
            "she": self.she,
            "She": self.she.capitalize(),
            "her": self.her,
            "Her": self.her.capitalize(),
            "him": self.object,
        }


def held_out(*parts: object, percent: int = TEST_PERCENT) -> bool:
    """Tell whether a combination belongs to the tests; the same answer for every seed, machine and version."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < percent


def on_side(split: Split, *parts: object) -> bool:
    """Tell whether a combination may be used on the given side of the split."""
    return held_out(*parts) == (split == "heldout")


@cache
def people(split: Split) -> tuple[Person, ...]:
    """Return the people of one side of the split, in a fixed order."""
    pool = []
    for endings, pronouns in ((_HER_ENDINGS, ("she", "her", "her")), (_HIS_ENDINGS, ("he", "his", "him"))):
        names = sorted({first + last for first in _FIRST for last in endings} - _TAKEN)
        pool += [Person(name, *pronouns) for name in names if on_side(split, "person", name)]
    return tuple(pool)


@cache
def towns(split: Split) -> tuple[str, ...]:
    """Return the towns of one side of the split, in a fixed order."""
    names = sorted(first + last for first in _TOWN_FIRST for last in _TOWN_LAST)
    return tuple(name for name in names if on_side(split, "town", name))


@cache
def all_names() -> frozenset[str]:
    """Return every name of a person or a town, of both sides."""
    sides: tuple[Split, ...] = ("train", "heldout")
    return frozenset(p.name for s in sides for p in people(s)) | frozenset(t for s in sides for t in towns(s))


def cast(rng: random.Random, num: int, split: Split = "train") -> list[Person]:
    """Return `num` different people."""
    return rng.sample(people(split), num)


def pick_allowed(rng: random.Random, options: Sequence[T], split: Split, *key: object) -> T:
    """Return a random option whose combination with `key` lies on the given side of the split.

    Raises ValueError when there is none, which is a fault of the word lists.
    """
    allowed = [option for option in options if on_side(split, *key, option)]
    if not allowed:
        raise ValueError(f"no option for {key} on the side {split}")
    return rng.choice(allowed)
