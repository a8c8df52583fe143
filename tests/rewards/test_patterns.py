"""Searches end: one that would take centuries has found nothing after its time, and the next is answered."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.rewards.patterns import Searcher, searcher
from trivium.rewards.verifiable import check

HOPELESS = [
    (r"(a+)+b", "a" * 60),
    (r"(a|aa)+$", "a" * 80 + "!"),
    (r"^(\w+\s?)*$", "some words and then " * 4 + "!"),
    (r"(.*)*\1x", "ab" * 40),
]


@pytest.mark.parametrize(("pattern", "text"), HOPELESS)
def test_a_search_that_would_never_end_has_found_nothing(pattern: str, text: str) -> None:
    """Two to the sixtieth ways to try: it is ended and counted, and the next search is answered as ever."""
    own = Searcher(seconds=0.1)
    try:
        assert own.found(pattern, text) is False
        assert own.too_long == 1
        assert own.found("b.d", "abcd") is True and own.found("b.e", "abcd") is False
        assert own.too_long == 1
    finally:
        own.close()


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.sampled_from([r"\d+", r"^\s*$", r"[^\x00-\x7f]", "x|y\n", r"(?i)é", r"\bthe\b"]))
def test_it_finds_what_re_finds(text: str, pattern: str) -> None:
    """New lines, NULs and lone surrogates of the text included."""
    assert searcher.found(pattern, text) is (re.search(pattern, text) is not None)


def test_a_check_cannot_hang_and_a_forked_process_asks_its_own() -> None:
    """Two processes that shared one searcher would read each other's answers."""
    assert check({"kind": "regex", "pattern": r"^\d{3}$"}, "123")
    child = os.fork()
    if not child:
        right = all(searcher.found("a", "a" * (n % 2)) is bool(n % 2) for n in range(50))
        searcher.close()
        os._exit(0 if right else 1)
    assert all(searcher.found("b", "b" * (n % 2)) is bool(n % 2) for n in range(50))
    assert os.waitpid(child, 0)[1] == 0
