"""A guess at a text's language: stop words first, then `py3langid` where it is installed.

Stop words settle the common case at once (over a third of English text is made of these few). Where they do not, and
`py3langid` (extra `data`, its model lies in the package) is there, it decides; else the letters and the other
languages' stop words do, coarsely. Which of the two was at work is noted in the run, because results may differ.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from typing import Any

UNKNOWN = "und"
"""What is said of a text that no guess fits (ISO 639's own code for it)."""

STOP_WORDS: dict[str, frozenset[str]] = {
    "en": frozenset(
        "the and of to that with for this have from are you they he she it was is not at by his her a an in on has had "
        "be been were who what where when why how there but or as if can will would do does did we i my your their its "
        "than then because into out about one two all some many more very".split()
    ),
    "de": frozenset(
        "der die das und ist nicht ein eine ich mit von im zu den auf dem wir er sie hat kein sehr".split()
    ),
    "fr": frozenset("le la les et est des une dans je il elle nous pas avec pour que qui du au sur ne mon ma".split()),
    "es": frozenset("el la los las una y es en que por con no del mi ella para se su al como está tiene".split()),
    "it": frozenset("il lo la gli e è di che non una per con sono del della ha nel alla più anche".split()),
    "pt": frozenset("o a os as e é de que não uma em para com do da no na por mais ao se".split()),
    "nl": frozenset("de het een en van is niet dat in ik met op zijn voor te hij aan ze er".split()),
}
"""The most frequent small words; English first, in which a tie is decided."""

ENOUGH = {"en": 0.25}
"""The share of a language's stop words from which the guess is taken as settled; 0.12 where the list is short."""

MIN_WORDS = 20
"""Shorter texts are left unjudged: too few words to tell."""

_WORD = re.compile(r"[^\W\d_]+")
_SAMPLE_CHARS = 4000


def guesser() -> str:
    """Return which guesser settles the hard cases here: `py3langid` or `stop words`."""
    return "stop words" if _classifier() is None else "py3langid"


def guess_language(text: str) -> str | None:
    """Return the ISO 639-1 code of a text's language, UNKNOWN, or None when it is too short to tell."""
    sample = text[:_SAMPLE_CHARS].lower()
    words = _WORD.findall(sample)
    letters = sum(map(len, words))
    # Scripts without spaces have few, long words: there the letters say enough.
    if len(words) < MIN_WORDS and letters < 8 * MIN_WORDS:
        return None
    latin = sum(1 for c in sample if "a" <= c <= "z")
    shares = {code: sum(w in known for w in words) / max(len(words), 1) for code, known in STOP_WORDS.items()}
    best = max(shares, key=lambda code: shares[code])
    if best == "en" and shares["en"] >= ENOUGH["en"] and latin > 0.8 * letters:
        return "en"
    classifier = _classifier()
    if classifier is not None:
        return str(classifier(sample)[0])
    if latin < 0.5 * letters:
        return UNKNOWN
    return best if shares[best] >= ENOUGH.get(best, 0.12) else UNKNOWN


@functools.cache
def _classifier() -> Any:
    """Return py3langid's classifying function, or None where it is not installed."""
    if importlib.util.find_spec("py3langid") is None:
        return None
    import py3langid

    return py3langid.classify
