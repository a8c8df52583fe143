"""Open-ended requests and ideal responses in varying style.

Each feature that the hidden taste rewards (see `preferences.taste`) is in an ideal response with a probability of its
own, so that a model trained on them samples all styles and a reward has something to choose from.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from trivium.data.microworld.facts import animal_sentences
from trivium.data.microworld.names import Split, on_side
from trivium.data.microworld.phrases import CLOSINGS, FORMS, NAMING, NO_MENTION, PLAIN, REASONS
from trivium.data.microworld.world import ANIMAL, ANIMALS, HOBBIES, PLACES, THING, WEATHER, WORKERS, an, cap

MENTION, REASON, CLOSING = 0.65, 0.38, 0.38
"""The probability that an ideal response names its subject, gives a reason, ends warmly."""
LENGTHS = ((10, 16, 0.45), (26, 40, 0.35), (50, 58, 0.2))
"""Target lengths in words: (low, high, probability); the middle one is what the taste likes."""
MAX_WORDS = 60


@dataclass(frozen=True, slots=True)
class Subject:
    """What a request is about: its class, its words, and how it stands in a request."""

    kind: str
    words: tuple[str, ...]
    phrase: str


_HEROES = ("boy", "girl", "king", "farmer", "baker", "fox", "bear", "cat", "dog", "mouse")
_STORY_THINGS = (
    "lamp",
    "boat",
    "kite",
    "ball",
    "hat",
    "book",
    "key",
    "bell",
    "map",
    "box",
    "drum",
    "candle",
    "coin",
    "mirror",
)
_TOPIC_THINGS = (
    "lamp",
    "boat",
    "kite",
    "ball",
    "hat",
    "book",
    "key",
    "bell",
    "map",
    "box",
    "drum",
    "candle",
    "clock",
    "mirror",
    "ladder",
    "basket",
    "blanket",
    "bucket",
    "letter",
    "chair",
    "table",
    "spoon",
    "flute",
    "cart",
)


def subjects(split: Split) -> list[tuple[str, Subject]]:
    """Return all (request, subject) of one side of the split, in a fixed order."""
    pool = [Subject("animal", (a.name,), an(a.name)) for a in ANIMALS]
    pool += [Subject("place", (p,), f"the {p}") for p in sorted(PLACES)]
    pool += [Subject("weather", (w,), w) for w in sorted(WEATHER)]
    pool += [Subject("hobby", (h,), h) for h in sorted(HOBBIES)]
    pool += [Subject("thing", (t,), an(t)) for t in _TOPIC_THINGS]
    pool += [Subject("worker", (w,), an(w)) for w in sorted(WORKERS)]
    pool += [Subject("story", (h, t), f"{an(h)} and {an(t)}") for h in _HEROES for t in _STORY_THINGS]
    found = []
    for subject in pool:
        # A pair of a story is on one side with all its wordings: the combination itself must be new in the tests.
        if subject.kind == "story" and not on_side(split, "story", *subject.words):
            continue
        for form in FORMS[subject.kind]:
            if subject.kind == "story" or on_side(split, "request", form, *subject.words):
                found.append((form.format(x=subject.phrase), subject))
    return found


def _words(rng: random.Random, subject: Subject) -> dict[str, str]:
    """Return the words for the slots of this subject's templates."""
    x = subject.words[0]
    words = {"x": x, "X": cap(x), "ax": an(x), "Ax": cap(an(x))}
    if subject.kind == "animal":
        animal = ANIMAL[x]
        words |= {"habit": animal.habit, "food": animal.food, "look": animal.look, "akind": an(animal.kind)}
    elif subject.kind == "place":
        words |= {"found": PLACES[x][0], "happens": PLACES[x][1]}
    elif subject.kind in ("weather", "hobby"):
        why, like = (WEATHER if subject.kind == "weather" else HOBBIES)[x]
        words |= {"why": why, "like": like}
    elif subject.kind == "worker":
        _, where, does = WORKERS[x]
        words |= {"where": where, "does": does, "short": f"{an(x)} {does}"}
    elif subject.kind == "story":
        he = {"girl": "she", "boy": "he", "king": "he"}.get(x) or rng.choice(("he", "she"))
        words |= {"ay": an(subject.words[1]), "he": he, "He": cap(he)}
    return words


def _length(text: list[str]) -> int:
    return sum(len(sentence.split()) for sentence in text)


def respond(rng: random.Random, subject: Subject, *, style: tuple[bool, bool, bool] | None = None) -> str:
    """Return an ideal response of at most MAX_WORDS words.

    `style` fixes (names the subject, gives a reason, ends warmly); by default each is drawn on its own.
    """
    mention, reason, closing = style or (rng.random() < MENTION, rng.random() < REASON, rng.random() < CLOSING)
    words = _words(rng, subject)
    low, high, _ = rng.choices(LENGTHS, [p for _, _, p in LENGTHS])[0]
    target = rng.randint(low, high)
    plain = list(PLAIN[subject.kind])
    if subject.kind == "animal":
        own = [
            s.replace(cap(an(subject.words[0])), "It", 1) for s in animal_sentences(rng, ANIMAL[subject.words[0]])[1:]
        ]
        plain = own[:6] + rng.sample(plain, 3)
    order = (
        sorted(rng.sample(range(len(plain)), len(plain) - 1)) if subject.kind == "story" else list(range(len(plain)))
    )
    if subject.kind != "story":
        rng.shuffle(order)
    first = rng.choice((NAMING if mention else NO_MENTION)[subject.kind]).format(**words)
    why = [rng.choice(REASONS[subject.kind]).format(**words)] if reason else []
    end = [rng.choice(CLOSINGS)] if closing else []
    body: list[tuple[int, str]] = []
    chosen = list(order)
    rng.shuffle(chosen)
    for index in chosen:
        sentence = plain[index].format(**words)
        size = _length([first, *why, *end, *(s for _, s in body)])
        if size >= target or size + len(sentence.split()) > MAX_WORDS:
            break
        if sentence not in (first, *why) and not (mention is False and subject.words[0] in sentence):
            body.append((order.index(index), sentence))
    middle = [s for _, s in sorted(body)] if subject.kind == "story" else [s for _, s in body]
    if why:
        middle.insert(rng.randint(0, len(middle)), why[0])
    return " ".join([first, *middle, *end])


def request(rng: random.Random, split: Split = "train") -> tuple[str, Subject]:
    """Return a random open-ended request of one side, each class of subject equally likely to come up."""
    kind = rng.choice(("animal", "animal", "place", "weather", "hobby", "thing", "worker", "story", "story"))
    return rng.choice(_by_kind(split)[kind])


_POOLS: dict[Split, dict[str, list[tuple[str, Subject]]]] = {}


def _by_kind(split: Split) -> dict[str, list[tuple[str, Subject]]]:
    if split not in _POOLS:
        pool: dict[str, list[tuple[str, Subject]]] = {kind: [] for kind in FORMS}
        for text, subject in subjects(split):
            pool[subject.kind].append((text, subject))
        _POOLS[split] = pool
    return _POOLS[split]


def opinion(rng: random.Random) -> str:
    """Return a paragraph for the documents: what somebody could say about a subject, without the request."""
    _, subject = request(rng)
    return respond(rng, subject, style=(True, rng.random() < REASON, rng.random() < CLOSING))


def known_subjects() -> dict[str, str]:
    """Return every word that names a subject (singular or plural), with the singular."""
    words = {a.plural: a.name for a in ANIMALS} | {THING[t].plural: t for t in {*_TOPIC_THINGS, *_STORY_THINGS}}
    singles = {*ANIMAL, *PLACES, *WEATHER, *HOBBIES, *_TOPIC_THINGS, *_STORY_THINGS, *WORKERS, *_HEROES}
    words |= {h + "s": h for h in (*_HEROES, *WORKERS, *PLACES) if h not in ("fox", "mouse")}
    return words | {s: s for s in singles}
