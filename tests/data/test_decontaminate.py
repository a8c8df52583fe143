"""Decontamination, with the bars of CORRECTNESS row 14: exact 100 %, partial at least 95 %, controls none."""

import random

import pytest

from trivium.data.decontaminate import Contamination, item_texts

SYLLABLES = ["ka", "lo", "mi", "ren", "tos", "vel", "zu", "bar", "nik", "pol", "sed", "gru"]


def sentence(rng, length):
    return " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(length))


@pytest.fixture(scope="module")
def planted():
    rng = random.Random(0)
    items = [sentence(rng, rng.randint(20, 40)) for _ in range(100)]
    controls = [sentence(rng, 120) for _ in range(1000)]
    return items, controls, Contamination(items)


def around(rng, text):
    return f"{sentence(rng, 40)}. {text}. {sentence(rng, 40)}"


def test_exact_items_are_all_found(planted):
    items, _, contamination = planted
    rng = random.Random(1)
    assert all(contamination.find(around(rng, item)) for item in items)


def test_case_space_and_punctuation_do_not_hide_an_item(planted):
    items, _, contamination = planted
    rng = random.Random(2)
    disguises = (str.upper, str.title, lambda t: t.replace(" ", "  \n"), lambda t: t.replace(" ", ", ").capitalize())
    assert all(contamination.find(around(rng, disguises[i % 4](item))) for i, item in enumerate(items))


def test_thirteen_words_of_an_item_suffice_and_twelve_do_not(planted):
    items, _, contamination = planted
    rng = random.Random(3)
    starts = [rng.randint(0, len(item.split()) - 13) for item in items]
    found = [
        contamination.find(around(rng, " ".join(t.split()[s : s + 13]))) for t, s in zip(items, starts, strict=True)
    ]
    assert sum(hit is not None for hit in found) >= 95
    assert found[0] == " ".join(items[0].split()[starts[0] : starts[0] + 13])
    assert not any(contamination.find(f"stranger {' '.join(item.split()[:12])} stranger") for item in items)


def test_no_control_is_flagged(planted):
    _, controls, contamination = planted
    assert not any(contamination.find(text) for text in controls)


def test_short_items_count_whole_and_very_short_ones_not_at_all():
    contamination = Contamination(["the precise origin of fortune cookies is unclear", "in the city of Paris"])
    assert contamination.find("He wrote: The precise origin of fortune cookies is unclear. Then he left.")
    assert not contamination.find("the precise origin of fortune cookies is known")
    assert not contamination.find("She lives in the city of Paris with her cat.")
    assert not Contamination([]) and Contamination([]).find("anything") is None


def test_item_texts_finds_every_text_whatever_the_schema():
    row = {
        "id": "x",
        "source": "y",
        "question": "q",
        "choices": ["a", {"text": "b"}],
        "messages": [{"role": "user", "content": "c"}],
        "answer": 3,
    }
    assert sorted(item_texts(row)) == ["a", "b", "c", "q", "user"]
