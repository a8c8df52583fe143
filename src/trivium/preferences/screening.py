"""Is anything wrong with these judgements? Every question that has a test, asked at once and corrected for that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from trivium.preferences.bias import leaning_test, position_test
from trivium.preferences.conduct import drift
from trivium.preferences.sheet import Sheet, leanings, sheet_of
from trivium.preferences.significance import Tested, contrast, holm
from trivium.records import Ranking

ALPHA = 0.04
"""How likely a false alarm may be, of all questions together: a little under the 5% that is promised, because the tests
lean on the distributions of large samples."""
FEWEST = 30
"""Judgements below which a question is not asked: the tests lean on the normal distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One question with its answer.

    `question` is `position`, `length`, `agreement`, `drift` or `model NAME`; `annotator` is None for all together.
    `effect` is the test's own (see there), `p` stands alone, `p_adjusted` is Holm's over all questions asked.
    """

    question: str
    annotator: str | None
    effect: float
    p: float
    p_adjusted: float
    n: int

    @property
    def alarm(self) -> bool:
        """Whether chance is not enough to explain it."""
        return self.p_adjusted <= ALPHA


def screen(
    rankings: Iterable[Ranking],
    lengths: Mapping[str, int] | None = None,
    policies: Mapping[str, str] | None = None,
    *,
    in_order_of_time: bool = False,
) -> list[Finding]:
    """Return the answers to every question that can be asked of the judgements, those with the smallest p first.

    Over all together: does the place on the screen matter, and are longer responses placed better. Of each
    annotator: the place; do they favour length (or a policy) more than the others; do they agree with the others less
    than these among themselves (one-sided); does that drift, where the rankings come in order of time. A question with
    fewer than FEWEST judgements is not asked. Holm's correction holds the false alarms of the whole family at ALPHA,
    half of it for the few questions about all, so that many annotators do not drown them. That is when nobody differs
    and length is not quality: an alarm names a thing to look at.
    """
    sheet = sheet_of(rankings)
    asked: list[tuple[str, str | None, Tested]] = []
    numbers: dict[str, Mapping[str, float]] = {"length": lengths} if lengths is not None else {}
    if policies is not None:
        names = sorted(set(policies.values()))
        # Of two policies one being favoured is the other's not being: asked once.
        for name in names[1:] if len(names) == 2 else names if len(names) > 2 else []:
            numbers[f"model {name}"] = {c: float(policy == name) for c, policy in policies.items()}
    leant = {question: leanings(sheet, of) for question, of in numbers.items()}
    asked.append(("position", None, position_test(sheet)))
    if lengths is not None:
        asked.append(("length", None, leaning_test(sheet, leant["length"])))
    for annotator in sheet.annotators if len(sheet.annotators) > 1 else ():
        asked.append(("position", annotator, position_test(sheet, annotator)))
        asked += [(question, annotator, leaning_test(sheet, v, annotator)) for question, v in leant.items()]
        asked.append(("agreement", annotator, agreement_test(sheet, annotator)))
        if in_order_of_time:
            asked.append(("drift", annotator, drift(sheet, annotator)))
    answered = [(q, a, t) for q, a, t in asked if not math.isnan(t.p) and t.n >= FEWEST]
    together = sum(a is None for _, a, _ in answered)
    shares = [1 / together if a is None else 1 / (len(answered) - together) for _, a, _ in answered]
    adjusted = holm([t.p for _, _, t in answered], shares)
    findings = [
        Finding(question=q, annotator=a, effect=t.effect, p=t.p, p_adjusted=p, n=t.n)
        for (q, a, t), p in zip(answered, adjusted, strict=True)
    ]
    return sorted(findings, key=lambda finding: finding.p)


def agreement_test(sheet: Sheet, annotator: str) -> Tested:
    """Return the agreement in pairs with the annotator less that in pairs without, clustered by prompt, one-sided.

    A spammer lowers the first. Undefined with two annotators: nobody can say which of them it is.
    """
    pairs, values = sheet.agreements
    mine = (sheet.who[pairs] == sheet.annotators.index(annotator)).any(axis=1) if len(pairs) else np.zeros(0, bool)
    return contrast(values, mine, sheet.prompts[pairs[:, 0]], side="below")
