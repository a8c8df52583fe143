"""Who criticises, who revises and who compares: code, a model at hand, or a model behind a server, asked alike.

Every answer is kept as it comes. One that failed (refused, too long, empty, not in the expected shape) is None: it
stands for nothing, and whoever asked counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from trivium.config import UserError
from trivium.records import Conversation
from trivium.rewards.constitution import (
    Example,
    Principle,
    choice_prompt,
    comparison_prompt,
    critique_prompt,
    revision_prompt,
    with_examples,
)
from trivium.rewards.verdicts import Choice, both_orders, chance_of_a, grouped, pairs_of
from trivium.runs.answers import Answers


class Assistant(Protocol):
    """A model that is asked: `training.questions.LocalModel`, or `rewards.endpoint.Endpoint`."""

    problem: str

    def fits(self, conversation: Conversation, /) -> bool:
        """Tell whether an answer has room behind the conversation."""
        ...

    def write(self, asked: Mapping[int, Conversation], purpose: int) -> Iterator[tuple[int, str | None]]:
        """Yield (number, what it wrote), as the answers come."""
        ...

    def choose(self, asked: Mapping[int, tuple[Conversation, Conversation]]) -> Iterator[tuple[int, Choice | None]]:
        """Yield (number, probabilities of the letters A and B) of questions given for a letter, and in words."""
        ...

    def price(self, number: int, /) -> tuple[int, float]:
        """Return the tokens and FLOPs that this run spent on the last answer to a question."""
        ...


@dataclass(frozen=True, kw_only=True)
class Review:
    """One round: each text's principle, critique and revision; None where there was no answer."""

    principle: Principle
    critique: str | None
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class Reviewer:
    """Criticises texts by principles and revises them. `critic` and `reviser` are code; None asks the assistant."""

    kept: Answers
    assistant: Assistant
    examples: Sequence[Example] = ()
    critic: Callable[..., Any] | None = None
    reviser: Callable[..., Any] | None = None

    def review(
        self, prompts: Sequence[Conversation], texts: Sequence[str], rules: Sequence[Principle], number: int
    ) -> list[Review]:
        """Return round `number` (from 0) of critique and revision of each text by its rule.

        What got no critique is not revised. Raises UserError where no question at all was answered.
        """
        parts = list(zip(prompts, texts, rules, strict=True))
        code: Callable[..., Any] | None = self.critic and (lambda p, t, r: self.critic(p, t, asdict(r)))  # type: ignore[misc]
        critiques = self._asked(critique_prompt, code, parts, 2 * number + 1)
        open_ = [i for i, critique in enumerate(critiques) if critique is not None]
        told = [(parts[i][0], parts[i][1], critiques[i] or "", parts[i][2]) for i in open_]
        code = self.reviser and (lambda p, t, c, _: self.reviser(p, t, c))  # type: ignore[misc]
        revised = dict(zip(open_, self._asked(revision_prompt, code, told, 2 * number + 2), strict=True))
        return [Review(principle=rule, critique=critiques[i], revision=revised.get(i)) for i, rule in enumerate(rules)]

    def _asked(
        self,
        question: Callable[..., Conversation],
        code: Callable[..., Any] | None,
        parts: Sequence[tuple[Any, ...]],
        purpose: int,
    ) -> list[str | None]:
        asked = [question(*part) for part in parts]
        name = f"{'critique' if purpose % 2 else 'revision'} {(purpose - 1) // 2}"
        if code is None:
            turns = 4 if purpose % 2 else 6
            asked = [with_examples(one, self.examples, turns, self.assistant.fits) for one in asked]
            found = self.kept.complete(
                name,
                asked,
                Conversation.as_dicts,
                lambda missing: self.assistant.write(missing, purpose),
                self.assistant.price,
            )
        else:
            found = self.kept.complete(
                name, asked, Conversation.as_dicts, lambda missing: _called(code, parts, missing)
            )
        if found and all(answer is None for answer in found):
            why = "code that returned no text" if code else self.assistant.problem or "no answer had any text"
            raise UserError(f"{name.split()[0]}s: none of {len(found)} questions was answered ({why})")
        return found


def _called(
    code: Callable[..., Any], parts: Sequence[tuple[Any, ...]], missing: Mapping[int, object]
) -> Iterator[tuple[int, str | None]]:
    for number in missing:
        answer = code(*parts[number])
        yield number, answer if isinstance(answer, str) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a model said of some texts: groups best first, and (i, j, probability that i is better than j)."""

    groups: list[list[int]]
    soft: tuple[tuple[int, int, float], ...]


def compare(
    kept: Answers,
    assistant: Assistant,
    items: Sequence[tuple[Conversation, Sequence[str], str]],
    counts: dict[str, int],
) -> list[Comparison | None]:
    """Return how the assistant places each item's texts by its question (a principle's `comparison`).

    An item is (prompt, texts, question). Every pair is asked in both orders. `groups` hold what both orders agreed on,
    `soft` the mean of both. A pair with an answer that failed is in neither, and an item with no pair left is None.
    `counts` is filled: questions `asked`, answers `malformed`, pairs that the orders `disagreed` on.

    The paper narrows the probabilities of a judge that reasons first to 40 to 60%; here nobody reasons, and nothing is
    narrowed.
    """
    places = [(n, i, j) for n, (_, texts, _) in enumerate(items) for i, j in pairs_of(len(texts))]
    asked = []
    for n, i, j in places:
        prompt, texts, question = items[n]
        for first, second in ((texts[i], texts[j]), (texts[j], texts[i])):
            pair = (prompt, first, second, question)
            asked.append((choice_prompt(*pair), comparison_prompt(*pair)))
    choices = kept.complete("comparison", asked, lambda pair: pair[0].as_dicts(), assistant.choose, assistant.price)
    outcome: list[dict[tuple[int, int], float | None]] = [{} for _ in items]
    soft: list[list[tuple[int, int, float]]] = [[] for _ in items]
    counts |= {"asked": len(asked), "malformed": sum(chance_of_a(c) is None for c in choices), "disagreed": 0}
    for (n, i, j), forward, backward in zip(places, choices[::2], choices[1::2], strict=True):
        found = both_orders(forward, backward)
        outcome[n][i, j] = found[0] if found else None
        if found:
            soft[n].append((i, j, found[1]))
            counts["disagreed"] += found[0] == 0
    return [
        Comparison(groups=grouped(len(texts), outcome[n]), soft=tuple(soft[n])) if soft[n] else None
        for n, (_, texts, _) in enumerate(items)
    ]


def ranked_by_code(
    kept: Answers,
    judge: Callable[..., Sequence[Sequence[int]]],
    items: Sequence[tuple[Conversation, Sequence[str], Mapping[str, str], Any]],
) -> list[Comparison | None]:
    """Return the groups that `judge(prompt, texts, principle, rng)` gives for each item, best first; no soft labels."""

    def ask(missing: Mapping[int, tuple[Any, ...]]) -> Iterator[tuple[int, list[list[int]]]]:
        for number, item in missing.items():
            yield number, [[int(place) for place in group] for group in judge(*item)]

    found = kept.complete("ranking", items, lambda item: [item[0].as_dicts(), list(item[1]), dict(item[2])], ask)
    return [Comparison(groups=groups, soft=()) for groups in found]
