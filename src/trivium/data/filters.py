"""Filters: each answers None to keep a document, or the reason to drop it.

The thresholds are those of MassiveText's quality and repetition rules ("Gopher", arXiv:2112.11446, tables A1 and A2),
where a rule has a counterpart there:

    rule                                      there          here
    words in a document                       50 - 100,000   min_words (10) - 100,000
    mean word length                          3 - 10         3 - 10, of words with a letter
    "#" or ellipsis per word                  <= 0.10        <= 0.10
    lines that begin with a bullet            <= 0.90        <= 0.90
    lines that end with an ellipsis           <= 0.30        <= 0.30
    words with a letter                       >= 0.80        with a letter or digit, >= 0.50
    of the, be, to, of, and, that, have, with >= 2           a tenth of small words, English of 30 words or more
    duplicate lines, by count / characters    0.30 / 0.20    the same, lines of three words or more
    duplicate paragraphs                      0.30 / 0.20    covered by lines
    characters in the top 2-, 3-, 4-gram      0.20 0.18 0.16 the same, texts of 200 words or more
    characters in duplicate 5- ... 10-grams   0.15 ... 0.10  the same, texts of 200 words or more

In a short text of plain sentences ("A wolf is a mammal. A wolf has fur.") a few phrases of one shape reach the limits
on n-grams, hence 200 words. The others (encoding, markup, salad) are ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from trivium.data.language import STOP_WORDS, UNKNOWN, guess_language
from trivium.records import Document

Filter = Callable[[Document], str | None]

MAX_WORDS = 100_000
TOP_NGRAM_LIMITS = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_NGRAM_LIMITS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
MIN_WORDS_FOR_NGRAMS = 200
_BULLET = re.compile(r"^\s*[-*•‣◦▪–—]\s")
_MARKUP = re.compile(r"</?[a-zA-Z][^<>]{0,300}>|<!--|<!DOCTYPE", re.IGNORECASE)
_LONG_RUN = re.compile(r"[A-Za-z0-9+/=_-]{60,}")
_HEX_WORD = re.compile(r"\b(?=[0-9a-fA-F]*[0-9])(?=[0-9a-fA-F]*[a-fA-F])[0-9a-fA-F]{8,}\b")
# What UTF-8 looks like when read as Windows-1252 or Latin-1, and the sign for a byte that was lost.
_MOJIBAKE = re.compile(
    "[ÂÃÅÎÐÑØÙ][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â[\u0080-\u009f€][\u0080-\u00bf™œžŸ¦]?|\ufffd"
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
_CODE_LINE = re.compile(
    r"[{};]\s*$|^\s*[\"'][^\"']+[\"']\s*:|=>|\bfunction\s*\(|^\s*(?:var|let|const|return|import)\b.*[;(]"
)
_IMPOSSIBLE = re.compile(
    r"""\b(?:the|a|an)\ (?:the|an?|of|to|and|is|are|in|on|for|that|with|it|as|be|or|by|from|was|were|has|have|at|this
    |they|we)\b""",
    re.VERBOSE,
)
"""Pairs that shuffled English is full of and written English has not."""

BOILERPLATE = re.compile(
    r"""\b(?: (?:accept|use|uses)\ (?:all\ )?cookies | cookie\ (?:settings|policy|notice) | all\ rights\ reserved
    | skip\ to\ (?:main\ )?content | subscribe\ to\ (?:our|the)\ newsletter | enable\ javascript
    | javascript\ is\ disabled | share\ (?:this\ (?:page|post|article)|on\ (?:facebook|twitter))
    | free\ articles\ left | basket\ is\ empty | powered\ by\ wordpress
    | (?:log|sign)\ in\ (?:to|or)\ (?:post|comment|register) )\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""Lines that stand on many pages and say nothing of any."""

_SLIGHT = re.compile(
    r"""\b(?: privacy\ policy | terms\ (?:of\ (?:use|service)|and\ conditions) | back\ to\ top | click\ here\ to
    | sign\ up\ (?:now|for\ our) | leave\ a\ (?:comment|reply)\s*$ | read\ more\s*$ )""",
    re.IGNORECASE | re.VERBOSE,
)
"""What prose may say too: boilerplate only in a line of its own."""

_MENU = re.compile(r"^[A-Z][\w '&-]{0,30}(?:\s[|•·»]\s[A-Z][\w '&-]{0,30}){3,}$")
_LINE_CHARS = 200
_OWN_LINE_CHARS = 50


def clean_text(text: str) -> tuple[str, str]:
    """Return the text without boilerplate lines, and those lines; line ends become LF and outer white space goes."""
    lines = text.replace("\r\n", "\n").replace("\ufeff", "").split("\n")
    removed = [line for line in lines if _is_boilerplate(line)]
    gone = set(removed)
    kept = "\n".join(line for line in lines if line not in gone)
    return kept.strip("\n \t"), "\n".join(removed)


def _is_boilerplate(line: str) -> bool:
    """Tell whether a line is boilerplate; a long one that mentions cookies is prose about cookies."""
    if len(line) >= _LINE_CHARS:
        return False
    if BOILERPLATE.search(line) or _MENU.match(line.strip()):
        return True
    return len(line) < _OWN_LINE_CHARS and _SLIGHT.search(line) is not None


def built_in(*, min_chars: int, min_words: int, languages: Sequence[str]) -> list[Filter]:
    """Return the built-in filters, in the order to apply them: cheap and certain ones first."""
    filters: list[Filter] = [length(min_chars, min_words), encoding, machine_text, markup, symbols, repetition, menus]
    if languages:
        filters.append(language(languages))
    if "en" in languages:
        filters.append(english_prose)
    return filters


def first_reason(document: Document, filters: Iterable[Filter]) -> str | None:
    """Return the first filter's reason to drop the document, or None to keep it."""
    for rule in filters:
        reason = rule(document)
        if reason is not None:
            return reason
    return None


def length(min_chars: int, min_words: int) -> Filter:
    """Return a filter on characters and words."""

    def rule(document: Document) -> str | None:
        count = len(document.text.split())
        # Text without spaces (Chinese, Thai, but garbage too) is measured by its characters alone.
        spaced = count * 20 >= len(document.text)
        if len(document.text.strip()) < min_chars or (spaced and count < min_words):
            return "too short"
        return "too long" if count > MAX_WORDS else None

    return rule


def encoding(document: Document) -> str | None:
    """Drop what was decoded wrongly or is no text: control characters, lost bytes, UTF-8 read as Latin-1."""
    text = document.text
    if len(_CONTROL.findall(text)) > 0.01 * len(text):
        return "binary"
    broken = len(_MOJIBAKE.findall(text))
    return "broken encoding" if broken >= 3 and broken > 0.002 * len(text) else None


def machine_text(document: Document) -> str | None:
    """Drop hexadecimal and base64 dumps: long runs without a space, or words that are numbers in base 16."""
    text = document.text
    runs = sum(len(run) for run in _LONG_RUN.findall(text) if not _wordy(run))
    numbers = sum(len(word) for word in _HEX_WORD.findall(text))
    return "encoded data" if max(runs, numbers) > 0.3 * len(text) else None


def _wordy(run: str) -> bool:
    """Tell whether a long run is hyphened or slashed words (or a ruled line) rather than encoded data."""
    parts = re.split(r"[-_/=+]+", run)
    return max(map(len, parts)) < 25


def markup(document: Document) -> str | None:
    """Drop HTML that was not turned into text, and program or data files."""
    text = document.text
    tags = _MARKUP.findall(text)
    if len(tags) >= 5 and sum(map(len, tags)) > 0.15 * len(text):
        return "markup"
    lines = [line for line in text.split("\n") if line.strip()]
    code = sum(bool(_CODE_LINE.search(line)) for line in lines)
    braces = sum(text.count(c) for c in '{}();=<>[]"')
    if (len(lines) >= 5 and code > 0.6 * len(lines)) or braces > 0.10 * len(text):
        return "code or data"
    return None


def symbols(document: Document) -> str | None:
    """Drop what is more signs than words: MassiveText's rules on symbols, bullets, ellipses and word length."""
    text, words = document.text, document.text.split()
    lines = [line for line in text.split("\n") if line.strip()]
    ellipses = text.count("...") + text.count("…")
    letters = sum(any(c.isalnum() for c in word) for word in words)
    written = [len(word) for word in words if any(c.isalpha() for c in word)]
    spaced = any(c.isascii() and c.isalpha() for c in text[:1000])
    if max(text.count("#"), ellipses) > 0.1 * len(words) or letters < 0.5 * len(words):
        return "symbols"
    if sum(c.isalnum() or c.isspace() for c in text) < 0.6 * len(text):
        return "symbols"
    if spaced and written and not 3 <= sum(written) / len(written) <= 10:
        return "word length"
    if len(lines) >= 5 and sum(bool(_BULLET.match(line)) for line in lines) > 0.9 * len(lines):
        return "bullets only"
    if len(lines) >= 5 and sum(line.rstrip().endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "cut-off lines"
    return None


def repetition(document: Document) -> str | None:
    """Drop what says the same again and again: MassiveText's limits on duplicate lines and n-grams."""
    everything = Counter(line.strip() for line in document.text.split("\n") if line.strip())
    if everything and max(5, everything.total() // 2) < everything.most_common(1)[0][1]:
        return "repeated lines"
    # Short lines recur in good text: a play's speakers, a table's cells.
    lines = [line.strip() for line in document.text.split("\n") if len(line.split()) >= 3]
    counts = Counter(lines)
    total = sum(map(len, lines))
    again = sum(n - 1 for n in counts.values())
    if len(lines) >= 4 and again > 0.30 * len(lines):
        return "repeated lines"
    if len(lines) >= 4 and sum(len(line) * (n - 1) for line, n in counts.items()) > 0.20 * total:
        return "repeated lines"
    words = document.text.lower().split()
    return "repeated phrases" if len(words) >= MIN_WORDS_FOR_NGRAMS and repeats_phrases(words) else None


def repeats_phrases(words: Sequence[str]) -> bool:
    """Tell whether the most frequent 2- to 4-gram, or duplicate 5- to 10-grams, cover too many characters."""
    size = sum(map(len, words))
    for n, limit in TOP_NGRAM_LIMITS.items():
        gram, count = Counter(zip(*(words[i:] for i in range(n)), strict=False)).most_common(1)[0]
        if count > 1 and count * sum(map(len, gram)) > limit * size:
            return True
    for n, limit in DUPLICATE_NGRAM_LIMITS.items():
        covered = _duplicate_share(words, n, size)
        if covered > limit:
            return True
        # A duplicate 10-gram holds duplicate 5-grams, so the share can only fall with n.
        if covered <= min(DUPLICATE_NGRAM_LIMITS.values()):
            return False
    return False


def _duplicate_share(words: Sequence[str], n: int, size: int) -> float:
    """Return the share of characters that lie in an n-gram seen before in the text."""
    seen: set[tuple[str, ...]] = set()
    inside = [False] * len(words)
    for start, gram in enumerate(zip(*(words[i:] for i in range(n)), strict=False)):
        if gram in seen:
            inside[start : start + n] = [True] * n
        seen.add(gram)
    return sum(len(word) for word, hit in zip(words, inside, strict=True) if hit) / max(size, 1)


def menus(document: Document) -> str | None:
    """Drop navigation: many lines, nearly all of a few words without a full stop."""
    lines = [line.strip() for line in document.text.split("\n") if line.strip()]
    if len(lines) < 10:
        return None
    short = sum(len(line.split()) <= 4 for line in lines)
    ended = sum(line.endswith((".", "!", "?", ":", ";", ",", '"', "”", "'", ")")) for line in lines)
    return "boilerplate" if short > 0.7 * len(lines) and ended < 0.1 * len(lines) else None


def language(languages: Sequence[str]) -> Filter:
    """Return a filter that keeps these languages (ISO 639-1 codes), and texts too short to tell."""
    wanted = frozenset(languages)

    def rule(document: Document) -> str | None:
        found = guess_language(document.text)
        if found is None or found in wanted:
            return None
        return "unknown language" if found == UNKNOWN else "other language"

    return rule


def english_prose(document: Document) -> str | None:
    """Drop lists of keywords (no ordinary words) and shuffled words (articles before words none can precede)."""
    words = re.findall(r"[a-z']+", document.text.lower())
    if len(words) < 30:
        return None
    small = sum(word in STOP_WORDS["en"] for word in words)
    if small < 0.1 * len(words):
        return "no ordinary words"
    odd = len(_IMPOSSIBLE.findall(document.text))
    return "word salad" if odd >= 2 and odd > 0.005 * len(words) else None
