"""No name and no combination of the tests occurs in any training text."""

import re

import pytest

from trivium.data import microworld
from trivium.data.microworld import arithmetic, open_ended, safety
from trivium.data.microworld.names import held_out, people, towns
from trivium.data.microworld.world import (
    ADJECTIVES,
    ANIMALS,
    CARRIED,
    CATEGORY_USE,
    KIND_FACTS,
    MATERIAL_FEEL,
    NUMBERS,
    THING,
    THINGS,
    an,
)


@pytest.fixture(scope="module")
def joined(training_texts):
    return "\n".join(training_texts)


@pytest.fixture(scope="module")
def sentences(joined):
    return [s.strip().lower() for s in re.split(r"[.!?\n]+", joined) if s.strip()]


def test_name_pools_are_disjoint_and_share_their_syllables():
    train, test = {p.name for p in people("train")}, {p.name for p in people("heldout")}
    assert not train & test and len(train) > 150 and len(test) > 30
    assert not set(towns("train")) & set(towns("heldout")) and len(towns("heldout")) > 20
    assert {n[:2] for n in test} <= {n[:2] for n in train}
    assert {n[2:] for n in test} <= {n[2:] for n in train}


def test_no_test_name_in_training_texts(joined):
    words = {w.lower() for w in re.findall(r"[A-Za-z]+", joined)}
    assert not {p.name.lower() for p in people("heldout")} & words
    assert not {t.lower() for t in towns("heldout")} & words


def test_names_are_no_words_of_the_language(documents):
    lower = set()
    for document in documents:
        if "planted" not in document.meta:
            lower |= set(re.findall(r"\b[a-z]+\b", document.text))
    names = {p.name.lower() for s in ("train", "heldout") for p in people(s)}
    assert not names & lower


def test_no_held_out_fact_about_an_animal(sentences):
    for animal in ANIMALS:
        about = [s for s in set(sentences) if s.startswith(f"{an(animal.name)} ")]
        assert about
        for aspect, words in KIND_FACTS[animal.kind].items():
            if held_out("animal", animal.name, aspect):
                assert not [s for s in about if words in s], (animal.name, words)


def test_responses_about_an_animal_leave_out_its_held_out_facts(conversations, documents):
    """The same, where the animal is called `it`."""
    for animal in ANIMALS:
        texts = [
            c.messages[-1].content for c in conversations if re.search(rf"\b{animal.name}\b", c.messages[-2].content)
        ]
        paragraphs = [p for d in documents if d.meta["kind"] in ("animals", "opinions") for p in d.text.split("\n\n")]
        starts = (f"{an(animal.name)} is {an(animal.kind)}.", f"the {animal.name} ", f"i like the {animal.name} ")
        texts += [p for p in paragraphs if p.lower().startswith(starts)]
        for aspect, words in KIND_FACTS[animal.kind].items():
            if held_out("animal", animal.name, aspect):
                pattern = rf"\b(it|{an(animal.name)}) (has )?{words}\."
                assert not [t for t in texts if re.search(pattern, t.lower())]


def test_no_held_out_fact_about_a_thing(sentences):
    about = set(sentences)
    for thing in THINGS:
        if thing.category in CATEGORY_USE and held_out("thing", thing.name, "use"):
            assert f"{an(thing.name)} is something you {CATEGORY_USE[thing.category]}" not in about
        if thing.material and held_out("thing", thing.name, "material"):
            assert f"{an(thing.name)} {MATERIAL_FEEL[thing.material]}" not in about


def test_no_held_out_adjective_with_its_noun(joined):
    text = joined.lower()
    pairs = set(re.findall(r"(?=\b([a-z]+) ([a-z]+)\b)", text))
    said = set(re.findall(r"\bthe (\w+) (?:of \w+ )?(?:is|are) (\w+)\b", text))
    for thing in CARRIED:
        for adjective in ADJECTIVES:
            if held_out("adjective", thing, adjective):
                assert (adjective, thing) not in pairs, (adjective, thing)
                assert (thing, adjective) not in said and (THING[thing].plural, adjective) not in said


def test_no_held_out_sum(joined):
    digits = set(re.findall(r"(?<![\d+] )\b(\d+) ([+-]) (\d+) =", joined))
    digits |= set(re.findall(r"(?<![+-] )\b(\d+) ([+-]) (\d+)\b(?! [+-])", joined))
    number = {word: i for i, word in enumerate(NUMBERS)}
    found = {(int(a), sign, int(b)) for a, sign, b in digits}
    for a, sign, b in re.findall(r"\b(\w+) (plus|minus) (\w+)\b", joined.lower()):
        found.add((number[a], "+" if sign == "plus" else "-", number[b]))
    assert len(found) > 200
    assert not found & {(a, sign, b) for a, sign, b, _ in arithmetic.pairs("heldout")}
    assert not {(a, b) for a, sign, b in found if sign == "+"} & set(arithmetic.long_sums("heldout"))
    triples = {tuple(map(int, t)) for t in re.findall(r"\b(\d+) \+ (\d+) \+ (\d+)\b", joined)}
    assert len(triples) > 150 and not triples & set(arithmetic.triples("heldout"))


def test_no_held_out_act(joined):
    text = joined.lower()
    for act, _ in safety.harmful_acts("heldout") + safety.look_alikes("heldout"):
        assert act not in text
    assert len(safety.harmful_acts("heldout")) >= 8 and len(safety.look_alikes("heldout")) >= 6


def test_no_test_prompt_among_training_prompts(conversations, items):
    asked = {m.content for c in conversations for m in c.messages if m.role == "user"}
    asked |= {c.messages[0].content for c in microworld.preference_prompts(1, num=1000)}
    tested = [i for i in items if i["split"] == "test" and i["kind"] == "generate"]
    assert not [i for i in tested if i["messages"][0]["content"] in asked]


def test_story_pairs_and_requests_are_split():
    train, test = open_ended.subjects("train"), open_ended.subjects("heldout")
    assert not {text for text, _ in train} & {text for text, _ in test}
    stories = [{s.words for _, s in side if s.kind == "story"} for side in (train, test)]
    assert not stories[0] & stories[1]
    assert {s.kind for _, s in test} == set(open_ended.FORMS)


def test_no_held_out_story_pair_in_documents(documents):
    pairs = {s.words for _, s in open_ended.subjects("heldout") if s.kind == "story"}
    for document in documents:
        if document.meta["kind"] == "opinions":
            for hero, thing in pairs:
                assert f"{an(hero)} found {an(thing)}" not in document.text


def test_choice_items_are_new_sentences(items, sentences):
    known = set(sentences)
    for item in items:
        if item["task"] == "grammar" and item["split"] == "test":
            right = item["context"] + item["choices"][item["answer"]]
            assert right.strip(".").lower() not in known


def test_every_derived_fact_is_known_of_several_members():
    """A held-out fact can be inferred: three or more other members have it in training texts."""
    for kind, facts in KIND_FACTS.items():
        for aspect in facts:
            assert sum(a.kind == kind and not held_out("animal", a.name, aspect) for a in ANIMALS) >= 3, (kind, aspect)
    for category in CATEGORY_USE:
        assert sum(t.category == category and not held_out("thing", t.name, "use") for t in THINGS) >= 3, category
    for material in MATERIAL_FEEL:
        assert sum(t.material == material and not held_out("thing", t.name, "material") for t in THINGS) >= 3, material
