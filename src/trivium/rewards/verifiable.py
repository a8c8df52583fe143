r"""Rewards that a program can check: a specification (plain JSON) and a text give true or false.

The kinds, each `{"kind": ..., ...}`; words and answers compare without regard to case::

    exact         answers: [str]           the whole text, outer punctuation and space aside
    contains      words: [str]             every one of them, as whole words
    not_contains  words: [str]             none of them, as whole words
    bullets       count: n                 exactly n lines, each "- something"
    words         min, max                 number of words, either bound may be left out
    sentences     min, max                 number of sentences
    uppercase, lowercase                   has letters, and all of that case
    starts_with, ends_with   text: str     of the text without outer space; here case counts
    number        answer: "17"             the last number in the text
    regex         pattern: str             found anywhere, within a second of processor time
    code          tests: [str]             statements that hold once the code of the text has run (`assert f(1) == 2`);
                  setup: str, time_s       what stands before the code, and its time limit (4); both may be left out
    refusal       expected: bool, markers  whether any marker occurs, compared with expected
    all           of: [spec]               every one of them
    taste         (nothing)                graded by a judge in the evaluate stage, never here
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, InvalidOperation
from typing import Any

from trivium.config import UserError, suggest
from trivium.records import Completion, Conversation
from trivium.rewards import code
from trivium.rewards.patterns import searcher

Reward = Callable[[Sequence[Conversation], Sequence[Completion]], list[float]]
"""Every reward has this shape: one number per (prompt, completion)."""

_NUMBER = re.compile(r"(?<!\w)-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


def check(spec: Mapping[str, Any], text: str) -> bool:
    """Return whether `text` meets the specification.

    Raises UserError for one that `validate` refuses, for kind `taste`, which no program can check, and for kind `code`
    where code cannot be shut in.
    """
    validate(spec)
    if spec["kind"] == "taste":
        raise UserError("a check of kind 'taste' needs a judge; set `judge` in the evaluate stage")
    return _CHECKS[spec["kind"]][1](spec, text)


def validate(spec: Mapping[str, Any]) -> None:
    """Raise UserError unless the specification has a known kind and the fields that it needs, of the right type."""
    kind = spec.get("kind") if isinstance(spec, Mapping) else None
    if not isinstance(kind, str) or kind not in _CHECKS:
        raise UserError(f"a check has kind {kind!r}{suggest(str(kind), _CHECKS)}")
    for name, wanted in _CHECKS[kind][0].items():
        value = spec.get(name)
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise UserError(f"a check of kind {kind!r} needs {name!r} as {wanted.__name__}, not {value!r}")
    if kind in ("words", "sentences"):
        bounds = [spec[name] for name in ("min", "max") if spec.get(name) is not None]
        if not bounds or not all(isinstance(bound, int) for bound in bounds):
            raise UserError(f"a check of kind {kind!r} needs 'min' or 'max' as int")
    if kind == "number" and _value(spec["answer"]) is None:
        raise UserError(f"a check of kind 'number' has the answer {spec['answer']!r}, which is no number")
    if kind == "regex":
        try:
            re.compile(spec["pattern"])
        except re.error as error:
            raise UserError(f"a check has the pattern {spec['pattern']!r}: {error}") from None
    if kind == "code":
        code.validate_tests(spec)
    for part in spec["of"] if kind == "all" else ():
        validate(part)


def check_reward(prompts: Sequence[Conversation], completions: Sequence[Completion]) -> list[float]:
    """Return 1 for each completion that meets the check in its prompt's `meta["check"]`, else 0: a Reward.

    Raises UserError for a prompt that brings no check.
    """
    for prompt in prompts:
        if "check" not in prompt.meta:
            asked = prompt.messages[-1].content[:60]
            raise UserError(f'the prompt {asked!r} has no "check"; a verifiable reward needs one in every prompt')
    specs, texts = [prompt.meta["check"] for prompt in prompts], [completion.text for completion in completions]
    if len(specs) != len(texts):
        raise ValueError(f"{len(specs)} prompts and {len(texts)} completions")
    # Side by side, because a check of code waits for processes of its own.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [float(passed) for passed in pool.map(check, specs, texts)]


def ended(prompts: Sequence[Conversation], completions: Sequence[Completion]) -> list[float]:
    """Return 0 for each completion that came to its end, -1 for one cut at the length limit: a Reward.

    PPO and rejection sampling have it as `missing_eos_penalty`. A learned reward has hardly seen such completions, and
    a policy that finds it kind to them never stops.
    """
    return [0.0 if completion.finish_reason == "stop" else -1.0 for completion in completions]


def last_number(text: str) -> str | None:
    """Return the last number in a text as it is written, or None; the minus of `5-3` is not a sign."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def has_word(word: str, text: str) -> bool:
    """Return whether `word` (or a phrase) occurs in the text as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", text.casefold()) is not None


def _bare(text: str) -> str:
    """Return the text in one case, with single spaces and without outer punctuation."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*()[]")


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None


def _same_number(spec: Mapping[str, Any], text: str) -> bool:
    found = last_number(text)
    return found is not None and _value(found) == _value(spec["answer"])


def _are_bullets(spec: Mapping[str, Any], text: str) -> bool:
    lines = text.strip().splitlines()
    return len(lines) == spec["count"] and all(re.match(r"\s*- \S", line) for line in lines)


def _within(spec: Mapping[str, Any], count: int) -> bool:
    low, high = spec.get("min"), spec.get("max")
    return (low is None or count >= low) and (high is None or count <= high)


def _num_sentences(text: str) -> int:
    """Return how many sentences a text has; a rest without its full stop counts as one."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return len(ends) + bool(text[ends[-1] if ends else 0 :].strip())


def _refuses(spec: Mapping[str, Any], text: str) -> bool:
    folded = text.casefold()
    return any(marker.casefold() in folded for marker in spec["markers"])


# kind -> (fields it must have, check)
_CHECKS: dict[str, tuple[dict[str, type], Callable[[Mapping[str, Any], str], bool]]] = {
    "exact": ({"answers": list}, lambda spec, text: _bare(text) in {_bare(answer) for answer in spec["answers"]}),
    "contains": ({"words": list}, lambda spec, text: all(has_word(word, text) for word in spec["words"])),
    "not_contains": ({"words": list}, lambda spec, text: not any(has_word(word, text) for word in spec["words"])),
    "bullets": ({"count": int}, _are_bullets),
    "words": ({}, lambda spec, text: _within(spec, len(text.split()))),
    "sentences": ({}, lambda spec, text: _within(spec, _num_sentences(text))),
    "uppercase": ({}, lambda spec, text: text.isupper()),
    "lowercase": ({}, lambda spec, text: text.islower()),
    "starts_with": ({"text": str}, lambda spec, text: text.strip().startswith(spec["text"])),
    "ends_with": ({"text": str}, lambda spec, text: text.strip().endswith(spec["text"])),
    "number": ({"answer": str}, _same_number),
    "regex": ({"pattern": str}, lambda spec, text: searcher.found(spec["pattern"], text)),
    "code": ({"tests": list}, code.passes),
    "refusal": ({"expected": bool, "markers": list}, lambda spec, text: _refuses(spec, text) == spec["expected"]),
    "all": ({"of": list}, lambda spec, text: all(check(part, text) for part in spec["of"])),
    "taste": ({}, lambda spec, text: False),
}
