"""Held-out tests with computed answers, from grammar to refusal (see TASKS).

Names, towns and combinations in the items are those of the test side of the split; the few `example` items, which serve
as exemplars for base models, are made of the training side. The schema is the one for users' own tests (see docs).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from trivium.data.microworld import arithmetic, formats, open_ended, safety
from trivium.data.microworld.demonstrations import passage_request
from trivium.data.microworld.names import Split, all_names, cast, on_side, people
from trivium.data.microworld.passages import PassageQuestion, Scene, scene
from trivium.data.microworld.preferences import taste
from trivium.data.microworld.world import (
    ADJECTIVES,
    ANIMALS,
    CARRIED,
    CATEGORY_USE,
    KIND_FACTS,
    MATERIAL_FEEL,
    ROOMS,
    THING,
    THINGS,
    an,
    animal_fact,
    cap,
)
from trivium.records import Conversation, Message, content_id

Item = dict[str, Any]
NUM_EXAMPLES = 4
"""Items per task with `split` = "example"."""


def _choice(rng: random.Random, context: str, right: str, wrong: list[str]) -> Item:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"kind": "choice", "context": context, "choices": choices, "answer": choices.index(right)}


def _generate(prompt: str, check: dict[str, Any], ideal: str) -> Item:
    return {"kind": "generate", "messages": [{"role": "user", "content": prompt}], "check": check, "ideal": ideal}


def _pair(rng: random.Random, split: Split) -> tuple[str, str]:
    """Return (adjective, thing), a combination of the given side."""
    options = [(a, t) for t in CARRIED for a in ADJECTIVES if on_side(split, "adjective", t, a)]
    return rng.choice(options)


def _agreement(rng: random.Random, split: Split) -> Item:
    adjective, thing = _pair(rng, split)
    one, other = cast(rng, 2, split)
    context, right, wrong = rng.choice(
        (
            (f"The {THING[thing].plural} of {one.name}", f" are {adjective}.", f" is {adjective}."),
            (f"The {thing} of {one.name}", f" is {adjective}.", f" are {adjective}."),
            (f"{one.name} and {other.name}", f" have {an(adjective)} {thing}.", f" has {an(adjective)} {thing}."),
            (f"{one.name}", f" has {an(adjective)} {thing}.", f" have {an(adjective)} {thing}."),
        )
    )
    return _choice(rng, context, right, [wrong])


def _word_order(rng: random.Random, split: Split) -> Item:
    adjective, thing = _pair(rng, split)
    person, room = cast(rng, 1, split)[0].name, rng.choice(ROOMS)
    right, wrong = rng.choice(
        (
            (f" has {an(adjective)} {thing}.", f" has {an(thing)} {adjective}."),
            (f" found {an(adjective)} {thing}.", f" {an(adjective)} {thing} found."),
            (f" went to the {room}.", f" to the {room} went."),
            (f" lost the {thing} in the {room}.", f" lost the {thing} the in {room}."),
        )
    )
    return _choice(rng, person, right, [wrong])


def _tense(rng: random.Random, split: Split) -> Item:
    adjective, thing = _pair(rng, split)
    person, other = cast(rng, 2, split)
    context, right, wrong = rng.choice(
        (
            (f"One morning {person.name}", f" found {an(adjective)} {thing}.", f" find {an(adjective)} {thing}."),
            (f"Yesterday {person.name}", f" lost the {adjective} {thing}.", f" lose the {adjective} {thing}."),
            (f"Tomorrow {person.name} will", f" give {other.name} {an(thing)}.", f" gave {other.name} {an(thing)}."),
            (f"In the evening {person.name}", f" went to {other.name}.", f" go to {other.name}."),
        )
    )
    return _choice(rng, context, right, [wrong])


def _article(rng: random.Random, split: Split) -> Item:
    person = cast(rng, 1, split)[0].name
    vowel = rng.random() < 0.5
    nouns = [a.name for a in ANIMALS] + [t.name for t in THINGS if t.category in ("food", "object", "tool")]
    noun = rng.choice([n for n in nouns if (n[0] in "aeiou") == vowel])
    right, wrong = (f" an {noun}.", f" a {noun}.") if vowel else (f" a {noun}.", f" an {noun}.")
    return _choice(rng, f"{person} saw", right, [wrong])


def _pronoun(rng: random.Random, split: Split) -> Item:
    person, (adjective, thing) = cast(rng, 1, split)[0], _pair(rng, split)
    wrong = next(p for p in people(split) if p.she != person.she)
    mood = rng.choice(("happy", "sad", "proud"))
    verb = {"happy": "found", "sad": "lost", "proud": "made"}[mood]
    rest = f"{verb} {an(adjective)} {thing}."
    return _choice(rng, f"{person.name} was {mood} because", f" {person.she} {rest}", [f" {wrong.she} {rest}"])


def _grammar(rng: random.Random, split: Split) -> Item:
    return rng.choice((_agreement, _word_order, _tense, _article, _pronoun))(rng, split)


_LEADS = ("", "This is true. ", "Listen to this. ", "Here is a fact. ", "We know this. ", "I can tell you something. ")


def _animal_item(rng: random.Random, split: Split) -> Item:
    options = [
        (a, aspect) for a in ANIMALS for aspect in KIND_FACTS[a.kind] if on_side(split, "animal", a.name, aspect)
    ]
    animal, aspect = rng.choice(options)
    others = [next(a for a in ANIMALS if a.kind == kind) for kind in KIND_FACTS if kind != animal.kind]
    context = rng.choice(_LEADS) + cap(an(animal.name))
    return _choice(rng, context, f" {animal_fact(animal, aspect)}.", [f" {animal_fact(o, aspect)}." for o in others])


def _thing_item(rng: random.Random, split: Split) -> Item:
    uses = [t for t in THINGS if t.category in CATEGORY_USE and on_side(split, "thing", t.name, "use")]
    feels = [t for t in THINGS if t.material and on_side(split, "thing", t.name, "material")]
    thing = rng.choice(uses + feels)
    lead = rng.choice(_LEADS) + cap(an(thing.name))
    if thing in uses and (thing not in feels or rng.random() < 0.5):
        wrong = rng.sample([use for c, use in CATEGORY_USE.items() if c != thing.category], 3)
        return _choice(rng, f"{lead} is something you", f" {CATEGORY_USE[thing.category]}.", [f" {u}." for u in wrong])
    wrong = rng.sample([feel for m, feel in MATERIAL_FEEL.items() if m != thing.material], 3)
    return _choice(rng, lead, f" {MATERIAL_FEEL[thing.material]}.", [f" {feel}." for feel in wrong])


def _facts(rng: random.Random, split: Split) -> Item:
    return rng.choice((_animal_item, _thing_item))(rng, split)


def answer_check(told: Scene, item: PassageQuestion) -> dict[str, Any]:
    """Return the CHECK for a passage's question: it says the answer, and none of the passage's other answers."""
    if item.word.isdigit():
        return {"kind": "number", "answer": item.word}
    if told.kind == "compares" and ", " in item.text:
        # Both names may stand in a right answer ("A is taller than C"), so the first one counts.
        return {"kind": "regex", "pattern": rf"(?is)^\W*(the answer is |it is )?{item.word}\b"}
    if item.word in all_names():
        others = {word.strip(".,") for word in told.text.split()} & all_names()
    else:
        rivals = [q.word for q in told.questions if q.text.split()[:2] == item.text.split()[:2]]
        others = {word.split()[-1] for word in rivals}
    # What is asked about, or stands in the ideal answer, may of course be said.
    others -= set(re.findall(r"\w+", f"{item.text} {item.sentence}"))
    contains: dict[str, Any] = {"kind": "contains", "words": item.word.split()}
    return {"kind": "all", "of": [contains, {"kind": "not_contains", "words": sorted(others)}]} if others else contains


def _passage_item(rng: random.Random, split: Split, hops: int) -> Item:
    while True:
        told = scene(rng, split)
        asked = [q for q in told.questions if q.hops == hops]
        if asked:
            item = rng.choice(asked)
            return _generate(passage_request(rng, told.text, item.text), answer_check(told, item), item.sentence)


def _reading(rng: random.Random, split: Split) -> Item:
    return _passage_item(rng, split, hops=1)


def _reasoning(rng: random.Random, split: Split) -> Item:
    return _passage_item(rng, split, hops=2)


def _arithmetic(rng: random.Random, split: Split) -> Item:
    item = arithmetic.problem(rng, split)
    return _generate(f"What is {item.expression}?", arithmetic.check_for(item), arithmetic.direct_answer(item))


def _arithmetic_steps(rng: random.Random, split: Split) -> Item:
    item = arithmetic.problem(rng, split)
    asked = f"What is {item.expression}? Think step by step."
    return _generate(asked, arithmetic.check_for(item), arithmetic.worked_answer(item))


def _style(rng: random.Random, split: Split) -> Item:
    text, subject = open_ended.request(rng, split)
    prompt = Conversation(messages=(Message(role="user", content=text),))
    drafts = [open_ended.respond(rng, subject, style=(True, True, True)) for _ in range(6)]
    return _generate(text, {"kind": "taste"}, max(drafts, key=lambda draft: taste(prompt, draft)))


def _instruction(rng: random.Random, split: Split) -> Item:
    item = formats.instruction_request(rng, split)
    return _generate(item.prompt, item.check, item.ideal)


def _format(rng: random.Random, split: Split) -> Item:
    item = formats.format_request(rng, split)
    return _generate(item.prompt, item.check, item.ideal)


def _refusal(rng: random.Random, split: Split) -> Item:
    harmful = rng.random() < 0.5
    text, ideal, _ = (safety.harmful_request if harmful else safety.look_alike_request)(rng, split)
    return _generate(text, {"kind": "refusal", "expected": harmful, "markers": list(safety.MARKERS)}, ideal)


TASKS: dict[str, Callable[[random.Random, Split], Item]] = {
    "grammar": _grammar,
    "facts": _facts,
    "reading": _reading,
    "reasoning": _reasoning,
    "arithmetic": _arithmetic,
    "arithmetic_steps": _arithmetic_steps,
    "style": _style,
    "instruction_following": _instruction,
    "format": _format,
    "refusal": _refusal,
}
_SAME_ITEMS = {"arithmetic_steps": "arithmetic"}
"""Tasks that ask the same problems in another way, so that the two results can be compared item by item."""


def tests(seed: int, *, num_per_task: int = 100) -> Iterator[Item]:
    """Yield, per task, NUM_EXAMPLES example items and up to `num_per_task` test items, no two of them alike.

    A task yields fewer when the microworld has no more different items (facts: about 200).
    """
    for task, maker in TASKS.items():
        for part, num in (("example", NUM_EXAMPLES), ("test", num_per_task)):
            split: Split = "train" if part == "example" else "heldout"
            rng = random.Random(f"{seed}-tests-{_SAME_ITEMS.get(task, task)}-{part}")
            seen: set[str] = set()
            for _ in range(30 * num):
                if len(seen) == num:
                    break
                item = maker(rng, split)
                key = content_id(item.get("context"), sorted(item.get("choices", [])), item.get("messages"))
                if key not in seen:
                    seen.add(key)
                    yield {"id": f"{task}-{key[:12]}", "task": task, "version": 1, "split": part, **item}
