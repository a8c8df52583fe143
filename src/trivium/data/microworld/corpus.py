"""The raw documents of the microworld: stories, descriptions, lists, sums and passages with questions.

`documents` is the demo's whole internet. About 12% of it is bad on purpose (see `planted`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from trivium.data.microworld import facts, planted, stories
from trivium.data.microworld.arithmetic import sum_sentences
from trivium.data.microworld.open_ended import opinion
from trivium.data.microworld.passages import MAKERS, scene
from trivium.data.microworld.world import ANIMALS, GROUPS, OPPOSITES, PLACES, THING, THINGS, WORKERS, an, cap, described
from trivium.records import Document

MIN_WORDS, MAX_WORDS = 40, 130


def _story(rng: random.Random) -> list[str]:
    return [" ".join(stories.told_story(rng))]


def _animals(rng: random.Random) -> list[str]:
    return [" ".join(facts.animal_sentences(rng, a)[: rng.randint(5, 9)]) for a in rng.sample(ANIMALS, 2)]


def _things(rng: random.Random) -> list[str]:
    sentences = [s for t in rng.sample(THINGS, 4) for s in facts.thing_sentences(rng, t)]
    return [" ".join(sentences)]


def _places(rng: random.Random) -> list[str]:
    place, worker = rng.choice(sorted(PLACES)), rng.choice(sorted(WORKERS))
    first = f"This is about the {place}."
    seen = f"In one corner stands {an(described(rng, 'table'))}, and on it lies {an(described(rng, 'book'))}."
    about = [first, *facts.place_sentences(rng, place)[:3], seen]
    return [" ".join(about), " ".join(facts.worker_sentences(rng, worker))]


def _kinds(rng: random.Random) -> list[str]:
    return [" ".join(facts.kind_sentences(rng)) for _ in range(3)]


def _diary(rng: random.Random) -> list[str]:
    return [" ".join(stories.diary(rng))]


def _dialogue(rng: random.Random) -> list[str]:
    lines = stories.dialogue(rng)
    return ["\n".join(lines)]


_HOW_TO: dict[str, tuple[str, ...]] = {
    "bake a cake": ("mix eggs, milk and sugar", "put it in a hot oven", "wait for one hour", "let it cool down"),
    "make tea": ("heat the water", "put the leaves in a pot", "pour the hot water over them", "wait and drink"),
    "plant a tree": ("dig a deep hole", "put the young tree in it", "fill the hole with earth", "give it water"),
    "wash a dog": ("fill a tub with warm water", "call the dog", "use soap with care", "dry the dog well"),
    "write a letter": ("take some paper", "think of your friend", "write what is new", "sign your name"),
    "catch a fish": ("find a quiet river", "put a worm on the hook", "wait without a word", "pull when it moves"),
    "build a kite": ("cut the paper", "tie two sticks together", "glue the paper on", "find a windy hill"),
    "make soup": ("cut the carrots", "boil the water", "put everything in the pot", "stir it and taste it"),
    "clean a room": ("open the window", "pick up your things", "sweep the floor", "carry out the dust"),
    "sleep well": ("close the curtains", "read a quiet book", "turn off the light", "think of something nice"),
}


def _how_to(rng: random.Random) -> list[str]:
    result = []
    for task, steps in rng.sample(sorted(_HOW_TO.items()), 2):
        if rng.random() < 0.5:
            result.append("\n".join([f"How to {task}:", *(f"- {step}" for step in steps)]))
        else:
            order = ("First", "Then", "After that", "At last")
            told = [f"{when} you {step}." for when, step in zip(order, steps, strict=True)]
            result.append(" ".join([f"Here is how to {task}.", *told]))
    return result


def _lists(rng: random.Random) -> list[str]:
    result = []
    for group in rng.sample(sorted(GROUPS), 3):
        words = rng.sample(GROUPS[group], min(len(GROUPS[group]), rng.randint(3, 4)))
        layout = rng.random()
        if layout < 0.4:
            result.append("\n".join([f"Some {group}:", *(f"- {w}" for w in words)]))
        elif layout < 0.7:
            result.append(f"{cap(group)}: {', '.join(words)}.")
        else:
            result.append(f"{cap(words[0])}, {words[1]} and {words[2]} are {group}.")
    pairs = rng.sample(OPPOSITES, 3)
    result.append(" ".join(f"The opposite of {a} is {b}." for a, b in pairs))
    return result


def _sums(rng: random.Random) -> list[str]:
    return [" ".join(sum_sentences(rng)) for _ in range(3)]


def _reading(rng: random.Random) -> list[str]:
    """Passages with questions in several layouts; the answers stand in the passage."""
    result = []
    for _ in range(2):
        told = scene(rng)
        asked = rng.sample(told.questions, min(len(told.questions), rng.randint(1, 3)))
        if rng.random() < 0.5:
            lines = [
                f"Question: {q.text}\nAnswer: {q.sentence if rng.random() < 0.6 else cap(q.word) + '.'}" for q in asked
            ]
            result.append("\n".join([told.text, *lines]))
        else:
            result.append(" ".join([told.text, *(f"{q.text} {q.sentence}" for q in asked)]))
    return result


def _retold(rng: random.Random) -> list[str]:
    """Passages told twice: the second time word for word or shuffled, with the same novel names."""
    told = scene(rng, kind=rng.choice([k for k in MAKERS if k != "counts"]))
    again = list(told.sentences)
    if told.kind in ("where", "has", "works", "lives", "because"):
        rng.shuffle(again)
    links = ("Let me say it again.", "In short:", "So this is what we know.", "{0} told me the same.")
    teller = told.sentences[0].split()[0]
    link = rng.choice(links).format(teller if teller != "First" else "A friend")
    return [" ".join([told.text, link, *again]), " ".join(q.sentence for q in told.questions[:3])]


def _world_questions(rng: random.Random) -> list[str]:
    lines = []
    for _ in range(5):
        item = facts.world_question(rng)
        lines.append(
            f"Question: {item.text}\nAnswer: {item.sentence}" if rng.random() < 0.5 else f"{item.text} {item.sentence}"
        )
    return lines


def _letter(rng: random.Random) -> list[str]:
    return ["\n".join(stories.letter(rng))]


_DAYS = (
    "Yesterday {name} found {a_coloured}.",
    "Tomorrow {name} will give {f_name} {a_coloured}.",
    "The {plural} of {name} are {adj}.",
    "The {thing} of {f_name} is {adj}.",
    "{name} and {f_name} have {a_coloured}.",
    "{f_name} has two {plural} and {name} has three {plural}.",
    "Every day {name} goes to the {place} and {f_name} goes to the {place2}.",
    "Last week {f_name} lost {f_her} {thing} in the {place}.",
    "{name} saw {an_animal} near the {place}.",
    "{name} was glad because {she} found {her} {thing}.",
    "{f_name} was glad because {f_she} made {a_thing}.",
    "In the evening {f_name} went to {name}.",
    "The {plural} are {adj}, and they are in the {place}.",
    "Next week they will go to {town}.",
    "{name} is afraid of {an_animal}, but {f_name} is not.",
    "There are many {plural} in the house of {f_name}.",
)


def _days(rng: random.Random) -> list[str]:
    """Loose sentences about yesterday and tomorrow, one thing and many: the grammar that stories rarely need."""
    words = stories.slots(rng)
    words |= {"plural": THING[words["thing"]].plural, "adj": described(rng, words["thing"]).split()[0]}
    return [" ".join(s.format(**words) for s in rng.sample(_DAYS, 7))]


def _opinions(rng: random.Random) -> list[str]:
    return [opinion(rng) for _ in range(2)]


KINDS: tuple[tuple[Callable[[random.Random], list[str]], int], ...] = (
    (_story, 20),
    (_animals, 10),
    (_things, 5),
    (_places, 5),
    (_kinds, 5),
    (_diary, 5),
    (_dialogue, 7),
    (_how_to, 4),
    (_lists, 5),
    (_sums, 8),
    (_reading, 14),
    (_retold, 4),
    (_world_questions, 5),
    (_letter, 3),
    (_opinions, 6),
    (_days, 7),
)
"""Each maker with its weight."""
_MAKERS, _WEIGHTS = [maker for maker, _ in KINDS], [weight for _, weight in KINDS]


def clean_document(rng: random.Random) -> tuple[str, str]:
    """Return (kind, text) of a good document of 40 to 130 words."""
    maker = rng.choices(_MAKERS, _WEIGHTS)[0]
    parts, words = maker(rng), 0
    while (words := sum(len(p.split()) for p in parts)) < MIN_WORDS:
        parts += maker(rng)
    while words > MAX_WORDS and len(parts) > 1:
        words -= len(parts.pop().split())
    if words > MAX_WORDS:
        parts = [parts[0][: parts[0].rindex(".", 0, len(" ".join(parts[0].split(" ")[:MAX_WORDS]))) + 1]]
    return maker.__name__.strip("_"), "\n\n".join(parts)


def documents(seed: int, *, num: int = 12000) -> Iterator[Document]:
    """Yield `num` documents; `meta` has `kind`, and `planted` for those with a problem (see `planted.SHARES`)."""
    rng = random.Random(f"{seed}-documents")
    kinds = [kind for kind, _ in planted.SHARES] + [""]
    weights = [share for _, share in planted.SHARES]
    weights.append(1.0 - sum(weights))
    recent: list[str] = []
    for _ in range(num):
        problem = rng.choices(kinds, weights)[0]
        copies = problem.endswith("_duplicate") and bool(recent)
        if problem in planted.MAKERS:
            text, kind = planted.MAKERS[problem](rng), "planted"
        elif copies:
            text, kind = rng.choice(recent), "planted"
            text = text if problem == "exact_duplicate" else planted.normalised_copy(rng, text)
        else:
            kind, text = clean_document(rng)
            recent.append(text)
        meta = {"kind": kind} | ({"planted": problem} if kind == "planted" else {})
        yield Document(text=text, source="microworld", license="Apache-2.0", meta=meta)
