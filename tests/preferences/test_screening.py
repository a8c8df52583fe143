"""The whole screening at once; how often it finds what is wrong is measured in test_judgement_power.py."""

import numpy as np
import pytest

from trivium.preferences.screening import ALPHA, FEWEST, agreement_test, screen
from trivium.preferences.sheet import sheet_of
from trivium.preferences.significance import holm
from trivium.records import Ranking


def collection(rng, *, prompts=60, people="xyz", spammer="", policy=None):
    """Return rankings of three responses by quality with noise; the spammer's are by chance."""
    rankings, lengths, policies = [], {}, {}
    for prompt in range(prompts):
        names = [f"{prompt}{name}" for name in "abc"]
        quality = rng.normal(size=3)
        lengths.update({name: int(rng.integers(50, 500)) for name in names})
        policies.update(dict(zip(names, ("s", "t", "t"), strict=True)))
        for who in people:
            utility = (0 if who == spammer else 1) * quality + 0.4 * rng.normal(size=3)
            shown = [names[i] for i in rng.permutation(3)]
            rankings.append(
                Ranking(
                    prompt_id=f"p{prompt}",
                    groups=tuple((names[i],) for i in np.argsort(-utility)),
                    annotator=who,
                    kind="simulated",
                    order_shown=tuple(shown),
                )
            )
    return rankings, lengths, policies


def test_the_family_holds_every_question_once():
    rankings, lengths, policies = collection(np.random.default_rng(0))
    found = screen(rankings, lengths, policies, in_order_of_time=True)
    asked = {(f.question, f.annotator) for f in found}
    own = {(q, who) for q in ("position", "length", "model t", "agreement", "drift") for who in "xyz"}
    assert asked == own | {("position", None), ("length", None)} and len(found) == len(asked)
    assert [f.p for f in found] == sorted(f.p for f in found)
    shares = [1 / 2 if f.annotator is None else 1 / 15 for f in found]
    assert [f.p_adjusted for f in found] == pytest.approx(holm([f.p for f in found], shares))
    assert {(f.question, f.annotator) for f in screen(rankings)} == {
        *((q, who) for q in ("position", "agreement") for who in "xyz"), ("position", None)
    }  # fmt: skip


def test_a_spammer_is_named_and_nobody_else():
    rankings, lengths, _ = collection(np.random.default_rng(1), spammer="y")
    alarms = [(f.question, f.annotator) for f in screen(rankings, lengths) if f.alarm]
    assert alarms == [("agreement", "y")]
    found = {who: agreement_test(sheet_of(rankings), who).effect for who in "xyz"}
    assert found["y"] < 0 < min(found["x"], found["z"])


def test_the_agreement_test_is_the_pairs_with_against_those_without():
    rankings, _, _ = collection(np.random.default_rng(2), prompts=5)
    sheet = sheet_of(rankings)
    pairs, values = sheet.agreements
    mine = [0 in (sheet.who[a], sheet.who[b]) for a, b in pairs]
    found = agreement_test(sheet, "x")
    assert found.effect == pytest.approx(values[mine].mean() - values[~np.array(mine)].mean())
    assert found.n == 10


def test_two_annotators_cannot_be_told_apart():
    rankings, lengths, _ = collection(np.random.default_rng(3), people="xy", spammer="y")
    assert not any(f.question == "agreement" for f in screen(rankings, lengths))


def test_too_few_judgements_are_not_asked_about():
    rankings, lengths, _ = collection(np.random.default_rng(4), prompts=FEWEST // 3)
    assert {f.annotator for f in screen(rankings, lengths)} == {None}
    assert screen([]) == [] and ALPHA == 0.04
