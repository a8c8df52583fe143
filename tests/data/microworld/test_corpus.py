"""The documents: seeded, of the right length, with the planted problems in their shares, and fast."""

import re
import time
from collections import Counter

from trivium.data import microworld
from trivium.data.microworld import corpus, planted
from trivium.data.microworld.preferences import vocabulary


def test_same_seed_same_documents_other_seed_others():
    first = [d.text for d in microworld.documents(3, num=200)]
    assert first == [d.text for d in microworld.documents(3, num=200)]
    other = [d.text for d in microworld.documents(4, num=200)]
    assert len(set(first) & set(other)) < 20


def test_fewer_documents_are_the_start_of_more():
    few = [d.text for d in microworld.documents(3, num=50)]
    assert few == [d.text for d in microworld.documents(3, num=200)][:50]


def test_planted_problems_have_their_shares(documents):
    counts = Counter(d.meta["planted"] for d in documents if "planted" in d.meta)
    assert 0.10 < sum(counts.values()) / len(documents) < 0.14
    for kind, share in planted.SHARES:
        assert share * 0.6 < counts[kind] / len(documents) < share * 1.4, kind


def test_planted_problems_are_what_they_are_called(documents):
    texts, seen = [d.text for d in documents], set()
    for document in documents:
        kind = document.meta.get("planted")
        if kind == "exact_duplicate":
            assert document.text in seen
        elif kind == "too_short":
            assert len(document.text.split()) < 10
        elif kind == "repetitive":
            assert len(set(document.text.splitlines())) == 1
        elif kind == "non_english":
            assert len(set(re.findall(r"\w+", document.text.lower())) & vocabulary()) < 15
        seen.add(document.text)
    clean = [d.text for d in documents if "planted" not in d.meta]
    assert len(set(clean)) > 0.98 * len(clean)
    folded = {" ".join(t.lower().split()) for t in clean}
    copies = [d.text for d in documents if d.meta.get("planted") == "normalised_duplicate"]
    assert all(" ".join(c.lower().split()) in folded for c in copies)
    assert len(set(copies) & set(clean)) < 0.05 * len(copies) and len(texts) == 6000


def test_clean_documents_have_forty_to_130_words(documents):
    for document in documents:
        if "planted" not in document.meta:
            assert corpus.MIN_WORDS * 0.7 <= len(document.text.split()) <= corpus.MAX_WORDS, document.text


def test_clean_documents_have_no_open_slots_and_wrong_articles(documents):
    for document in documents:
        if "planted" not in document.meta:
            assert "{" not in document.text and "  " not in document.text
            assert not re.search(r"\b[Aa] (?!us)[aeiou]\w+", document.text), document.text
            assert not re.search(r"\b[Aa]n [bcdfgjklmnpqrstvwxyz]\w+", document.text), document.text


def test_every_kind_of_document_occurs(documents):
    kinds = Counter(d.meta["kind"] for d in documents)
    assert set(kinds) == {maker.__name__.strip("_") for maker, _ in corpus.KINDS} | {"planted"}


def test_vocabulary_is_small_and_everyday():
    assert 700 <= len(vocabulary()) <= 1150


def test_names_come_back_within_a_document(documents):
    """Copying a novel name from the context must be worth learning: most documents with a name have it twice."""
    from trivium.data.microworld.names import people

    names = {p.name for p in people("train")}
    repeated = named = 0
    for document in documents:
        counts = Counter(w for w in re.findall(r"[A-Z][a-z]+", document.text) if w in names)
        named += bool(counts)
        repeated += any(n > 1 for n in counts.values())
    assert named > 0.4 * len(documents) and repeated > 0.9 * named


def test_twelve_thousand_documents_in_ten_seconds():
    start = time.perf_counter()
    assert sum(1 for _ in microworld.documents(0, num=12000)) == 12000
    assert time.perf_counter() - start < 10
