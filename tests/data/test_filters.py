"""Filters: each rule drops what it names and keeps its neighbours; the planted problems of the microworld are found."""

from collections import Counter, defaultdict

import pytest

from trivium.data import language as language_module
from trivium.data.filters import built_in, clean_text, first_reason
from trivium.data.language import guess_language
from trivium.records import Document

PROSE = (
    "The harbour was quiet that morning. A grey boat lay by the wall, and the man who owned it sat on a box with his "
    "breakfast. He had been there since before the sun rose, he said, because the fish do not wait for anyone."
)
MENU = "\n".join(["Home", "News", "About us", "Jobs", "Shop", "Contact", "Login", "Help", "Blog", "Search", "Menu"])
GERMAN = "Der alte Mann geht langsam durch den Wald. Das Wasser im Fluss ist sehr kalt. Wir haben heute kein Brot. " * 2
RULES = built_in(min_chars=50, min_words=10, languages=["en"])


def reason(text):
    return first_reason(Document(text=text), RULES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, None),
        (PROSE.upper(), None),
        ("What is 9 + 3 + 5? 9 + 3 = 12. 12 + 5 = 17. The answer is 17.\n\n17 + 3 = 20. 14 - 8 = 6. 2 + 2 = 4.", None),
        (
            "A wolf is a mammal. A wolf has fur. A wolf has four legs. A wolf lives in the forest. A wolf eats meat.",
            None,
        ),
        ("\n".join(f"ROMEO:\nThis is what he said about number {i}." for i in range(20)), None),
        ("Too short.", "too short"),
        ("4deabe613de5cf19415dfba7f9a46297" * 20, "encoded data"),
        (" ".join(f"{i * 987654321:012x}ab" for i in range(1, 60)), "encoded data"),
        ("IgX4+1/09tYx0zYbgMjWaLwy1+aeLHqo3Bu1t9VHosrJRSCa" * 20, "encoded data"),
        ("\x8b\x10\x81\x88" * 50 + PROSE, "binary"),
        (PROSE.replace("a", "\ufffd"), "broken encoding"),
        (("Les élèves étaient là. " * 9).encode().decode("cp1252"), "broken encoding"),
        ("<div class='x'><p>hello</p></div>\n" * 20, "markup"),
        ("const a = f(x);\nif (a) {\n  return b;\n}\nlet c = 5;\n" * 5, "code or data"),
        ("#@%&* {}[] <> /\\| ^~_= +$;: " * 20, "code or data"),
        ("*&^%$ @@@ ~~~ !!! ??? ... ,,, ;;; ''' *** &&& ^^^ " * 5, "symbols"),
        ("The best prices in town.\n" * 15, "repeated lines"),
        ("Click here.\n" * 15, "repeated lines"),
        ("\n".join(f"- the {w} of the house and garden" for w in PROSE.split()[:10]), "bullets only"),
        (MENU, "boilerplate"),
        (GERMAN, "other language"),
    ],
)
def test_rules(text, expected):
    assert reason(text) == expected


def test_lists_of_keywords_are_dropped():
    spam = "casino discount price sale free cheap coupon watches bonus loans online best shipping replica buy deal " * 4
    assert reason(spam) in ("no ordinary words", "other language")


def test_word_salad_and_its_original():
    import random

    words = (PROSE + " " + PROSE.replace("grey", "green").replace("man", "girl")).split()
    assert reason(" ".join(words)) is None
    random.Random(1).shuffle(words)
    assert reason(" ".join(words) + " the of was a the and") == "word salad"


def test_long_texts_that_say_the_same_in_lines_of_their_own_are_dropped():
    text = " ".join(
        f"We carve the oath number {i} so there shall be no one in this world that can alter it." for i in range(40)
    )
    assert reason(text) == "repeated phrases"


def test_boilerplate_lines_go_and_prose_about_them_stays():
    lines = [
        "Home | About us | News | Shop",
        "We use cookies to make this site better. Accept all cookies.",
        PROSE,
        "Back to top",
        "In the second part of the report the committee writes that terms of service are too long for anyone to read.",
        "x = int | str | None",
    ]
    text, removed = clean_text("\r\n".join(lines))
    assert text.split("\n") == [lines[2], *lines[4:]]
    assert removed.split("\n") == [lines[0], lines[1], lines[3]]
    assert clean_text(text) == (text, "")


@pytest.mark.parametrize("classifier", [True, False])
def test_language(monkeypatch, classifier):
    if not classifier:
        monkeypatch.setattr(language_module, "_classifier", lambda: None)
    samples = {
        "en": PROSE,
        "de": "Der alte Mann geht langsam durch den Wald und das Wasser ist kalt. Wir haben heute kein Brot im Haus.",
        "fr": "Le petit chat dort dans la maison et il fait froid. Nous allons au marché avec nos amis pour le pain.",
        "es": "El perro corre por la calle y mi hermano tiene una casa cerca del mar. Por la noche hace frío.",
    }
    for code, text in samples.items():
        assert guess_language(text) == code
    assert guess_language("Guten Tag") is None
    assert guess_language("Быстрая лиса прыгает через ленивую собаку и бежит дальше в лес. " * 4) not in (None, "en")
    assert guess_language("吾輩は猫である。名前はまだ無い。" * 20) not in (None, "en")


def test_without_languages_nothing_english_is_asked_for():
    rules = built_in(min_chars=20, min_words=3, languages=[])
    german = Document(text="Der alte Mann geht langsam durch den Wald. Das Wasser im Fluss ist sehr kalt. " * 3)
    assert first_reason(german, rules) is None


def test_the_microworlds_planted_problems_are_found_and_its_good_documents_kept():
    corpus = pytest.importorskip("trivium.data.microworld")
    found = defaultdict(Counter)
    for document in corpus.documents(1, num=1500):
        text, removed = clean_text(document.text)
        why = "boilerplate" if len(removed) > len(text) else first_reason(Document(text=text), RULES)
        found[document.meta.get("planted", "")][why is not None] += 1
    for planted in ("boilerplate", "noise", "too_short", "non_english", "repetitive"):
        assert found[planted][True] >= 0.95 * found[planted].total() > 0, planted
    assert found[""][True] <= 0.01 * found[""].total()
