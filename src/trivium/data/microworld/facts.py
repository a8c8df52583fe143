"""Sentences about the fixed world, and questions about it with their answers.

Only facts of the training side are ever put into words here; the others are asked for in `held_out_tests`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from trivium.data.microworld.world import (
    ANIMALS,
    CATEGORY_USE,
    GROUPS,
    KIND_FACTS,
    MATERIAL_FEEL,
    OPPOSITES,
    PLACES,
    THINGS,
    WORKERS,
    Animal,
    Thing,
    an,
    animal_fact,
    cap,
    home,
    known_aspects,
    listing,
    thing_facts,
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer in one word (or the fewest) and its answer as a sentence."""

    text: str
    word: str
    sentence: str
    kind: str = ""


def animal_sentences(rng: random.Random, animal: Animal) -> list[str]:
    """Return sentences about an animal in random order, the first naming its kind."""
    name = an(animal.name)
    subject = "It" if rng.random() < 0.5 else cap(name)
    sentences = [
        f"{subject} lives {home(animal)}.",
        f"{subject} eats {animal.food}.",
        f"{subject} is {an(animal.look)} animal.",
        f"{subject} {animal.habit}.",
    ]
    sentences += [f"{subject} {animal_fact(animal, aspect)}." for aspect in known_aspects(animal)]
    rng.shuffle(sentences)
    return [f"{cap(name)} is {an(animal.kind)}.", *sentences]


def thing_sentences(rng: random.Random, thing: Thing) -> list[str]:
    """Return sentences about a thing, at least two."""
    name = cap(an(thing.name))
    sentences = [f"{name} {fact}." for fact in thing_facts(thing)]
    if thing.material:
        sentences.append(f"{name} is made of {thing.material}.")
    if thing.category in CATEGORY_USE:
        category = {"food": "a kind of food", "clothes": "a piece of clothing"}.get(thing.category, an(thing.category))
        sentences.append(f"{name} is {category}.")
    places = ("the kitchen", "the market", "the old house", "the shop")
    sentences.append(f"You can find {an(thing.name)} in {rng.choice(places)}.")
    rng.shuffle(sentences)
    return sentences


def kind_sentences(rng: random.Random) -> list[str]:
    """Return general sentences about one kind of animal, one category or one material."""
    roll = rng.random()
    if roll < 0.5:
        kind = rng.choice(sorted(KIND_FACTS))
        facts = KIND_FACTS[kind]
        plural = {"fish": "fish"}.get(kind, kind + "s")
        young = {"mammal": "drink milk when they are young", "bird": "are chicks when they are young"}
        young |= {"fish": "are born in the water", "insect": "are grubs when they are young"}
        members = [a.plural for a in rng.sample([a for a in ANIMALS if a.kind == kind], 3)]
        sentences = [
            f"All {plural} have {facts['cover']}.",
            f"All {plural} have {facts['part']}.",
            f"All {plural} have {facts['legs']}.",
            f"All {plural} {young[kind]}.",
        ]
        rng.shuffle(sentences)
        return [f"{cap(listing(members))} are {plural}.", *sentences]
    if roll < 0.8:
        category = rng.choice(sorted(CATEGORY_USE))
        members = [t.name for t in rng.sample([t for t in THINGS if t.category == category], 2)]
        both = " and ".join(an(m) for m in members)
        kind = {"food": "food", "drink": "drinks", "clothes": "clothes", "vehicle": "vehicles"}.get(
            category, category + "s"
        )
        return [f"{cap(both)} are {kind}.", f"You {CATEGORY_USE[category]} {kind}."]
    material = rng.choice(sorted(MATERIAL_FEEL))
    members = [t.plural for t in rng.sample([t for t in THINGS if t.material == material], 2)]
    return [
        f"{cap(listing(members))} are made of {material}.",
        f"What is made of {material} {MATERIAL_FEEL[material]}.",
    ]


def place_sentences(rng: random.Random, place: str) -> list[str]:
    """Return sentences about a place."""
    found, happens = PLACES[place]
    names = [f"There you find {found}.", f"It is a good place because {happens}.", f"The {place} has {found}."]
    names.append(f"People go to the {place} because {happens}.")
    rng.shuffle(names)
    return names


def worker_sentences(rng: random.Random, worker: str) -> list[str]:
    """Return sentences about a worker."""
    _, place, does = WORKERS[worker]
    sentences = [f"{cap(an(worker))} {does}.", f"{cap(an(worker))} works in the {place}."]
    sentences.append(f"People need {an(worker)} because {an(worker)} {does}.")
    rng.shuffle(sentences)
    return sentences


def _animal_question(rng: random.Random) -> Question:
    animal = rng.choice(ANIMALS)
    name = an(animal.name)
    options = [
        Question(f"What kind of animal is {name}?", animal.kind, f"{cap(name)} is {an(animal.kind)}.", "animal"),
        Question(f"What does {name} eat?", animal.food, f"{cap(name)} eats {animal.food}.", "animal"),
        Question(f"Where does {name} live?", animal.home, f"{cap(name)} lives {home(animal)}.", "animal"),
        Question(f"What colour is {name}?", animal.look, f"{cap(name)} is {animal.look}.", "animal"),
    ]
    known, facts = known_aspects(animal), KIND_FACTS[animal.kind]
    if "legs" in known:
        legs = f"{cap(name)} has {facts['legs']}."
        options.append(Question(f"How many legs does {name} have?", facts["legs"].split()[0], legs, "animal"))
    if "cover" in known:
        text = f"What covers the body of {name}?"
        options.append(Question(text, facts["cover"].split()[-1], f"{cap(name)} has {facts['cover']}.", "animal"))
    if "part" in known:
        other = rng.choice([k for k in sorted(KIND_FACTS) if k != animal.kind])
        parts = rng.choice([facts["part"], KIND_FACTS[other]["part"]])
        true = parts == facts["part"]
        sentence = f"Yes, {name} has {parts}." if true else f"No, {name} does not have {parts}."
        options.append(Question(f"Does {name} have {parts}?", "yes" if true else "no", sentence, "animal"))
    return rng.choice(options)


def _thing_question(rng: random.Random) -> Question:
    thing = rng.choice([t for t in THINGS if t.material or thing_facts(t)])
    name, options = an(thing.name), []
    if thing.material:
        made = f"{cap(name)} is made of {thing.material}."
        options.append(Question(f"What is {name} made of?", thing.material, made, "thing"))
    for fact in thing_facts(thing):
        if fact.startswith("is something you "):
            use = fact.removeprefix("is something you ")
            text = f"What do you do with {name}?"
            options.append(Question(text, use, f"{cap(name)} is something you {use}.", "thing"))
    return rng.choice(options) if options else _animal_question(rng)


def _other_question(rng: random.Random) -> Question:
    roll = rng.random()
    if roll < 0.4:
        worker = rng.choice(sorted(WORKERS))
        _, place, does = WORKERS[worker]
        if rng.random() < 0.5:
            return Question(f"Who {does}?", worker, f"{cap(an(worker))} {does}.", "worker")
        return Question(f"Where does {an(worker)} work?", place, f"{cap(an(worker))} works in the {place}.", "worker")
    if roll < 0.7:
        first, second = rng.choice(OPPOSITES)
        if first != "light" and second != "light" and rng.random() < 0.5:
            first, second = second, first
        wordings = [f"What is the opposite of {first}?", f"Which word is the opposite of {first}?"]
        return Question(rng.choice(wordings), second, f"The opposite of {first} is {second}.", "opposite")
    group = rng.choice([g for g in sorted(GROUPS) if g in ("fruits", "tools", "toys", "drinks", "insects", "birds")])
    members = rng.sample(GROUPS[group], 3)
    return Question(f"Name some {group}.", members[0], f"{cap(listing(members))} are {group}.", "group")


def world_question(rng: random.Random) -> Question:
    """Return a question about the fixed world with its answer; no fact of the test side is asked for or told."""
    return rng.choice((_animal_question, _animal_question, _thing_question, _other_question))(rng)
