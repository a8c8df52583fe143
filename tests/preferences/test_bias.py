import itertools

import numpy as np
import pytest
import scipy.optimize

from trivium.preferences.bias import (
    leaning_test,
    length_effect,
    length_logistic,
    model_effect,
    position_effect,
    position_test,
)
from trivium.preferences.comparisons import derive
from trivium.preferences.sheet import leanings, sheet_of
from trivium.records import Ranking


def make(groups, shown=(), prompt="p"):
    groups = tuple(map(tuple, groups))
    return Ranking(prompt_id=prompt, groups=groups, annotator="x", kind="human", order_shown=tuple(shown))


def test_position_by_hand():
    # b > a = c, shown c b a: pairs (b over a: earlier wins), (b over c: later wins).
    assert position_effect([make(["b", "ac"], "cba")]).value == 0.5
    assert position_effect([make("abc", "abc")]).value == 1.0
    assert position_effect([make("abc", "cba")]).value == 0.0
    assert position_effect([make("abc")]) is None
    assert position_effect([]) is None


def test_length_by_hand():
    lengths = {"a": 10, "b": 20, "c": 20}
    # b > a > c: b over a longer wins; a over c shorter wins; b over c is no pair of different lengths.
    assert length_effect([make("bac")], lengths).value == 0.5
    assert length_effect([make("cb")], lengths) is None


@pytest.mark.parametrize(("bias", "seen"), [(0.0, False), (0.3, True)])
def test_an_injected_position_bias_is_seen_and_none_is_not(bias, seen):
    rng = np.random.default_rng(5)
    rankings = []
    for number in range(300):
        shown = [f"{number}{name}" for name in rng.permutation(list("ab"))]
        first_wins = rng.random() < 0.5 + bias / 2
        rankings.append(make([[n] for n in (shown if first_wins else shown[::-1])], shown, f"p{number}"))
    found = position_effect(rankings)
    assert (found.low > 0.5) is seen
    assert found.n == 300


def shown_pairs(rng, num, *, first=0.0, quality=None, who="x"):
    """Return judgements of pairs by quality with noise, of which a share is by the place alone."""
    rankings = []
    for number in range(num):
        names = [f"{number}{name}" for name in "ab"]
        better = quality[number] if quality is not None else 0.0
        shown = [names[i] for i in rng.permutation(2)]
        wins = rng.random() < 1 / (1 + np.exp(-better))
        order = names if wins else names[::-1]
        if rng.random() < first:
            order = shown
        rankings.append(
            Ranking(
                prompt_id=f"p{number}",
                groups=tuple((n,) for n in order),
                annotator=who,
                kind="human",
                order_shown=tuple(shown),
            )
        )
    return rankings


def test_position_test_by_hand():
    """Three pairs, the earlier one wins twice: z = (2 - 1) / sqrt(3), the sign test's."""
    rankings = [make("ab", "ab", "p"), make("cd", "cd", "q"), make("ef", "fe", "r")]
    found = position_test(sheet_of(rankings))
    assert found.z == pytest.approx(1 / np.sqrt(3))
    assert found.effect == pytest.approx(1 / 3)
    assert found.n == 3
    assert np.isnan(position_test(sheet_of([make("ab")])).p)
    assert np.isnan(position_test(sheet_of([make(["ab"], "ab")])).p)


def test_position_test_has_the_mean_and_variance_of_all_orders():
    """One ranking with a tie, all 24 orders on the screen: the statistic has mean 0 and variance 1."""
    z = [position_test(sheet_of([make(["a", "bc", "d"], order)])).z for order in itertools.permutations("abcd")]
    assert np.mean(z) == pytest.approx(0, abs=1e-12)
    assert np.var(z) == pytest.approx(1, abs=1e-12)


def test_what_others_say_sharpens_the_position_test():
    """An annotator with a bias of 20% beside two without: z grows as 1 / sqrt(1 - R^2) says, the effect stays.

    Alone z is 0.2 sqrt(200) = 2.83 on average; of 20 collections the mean has a standard error of 0.2, and the gain
    (here about 13%, 0.37) one of 0.12.
    """
    alone, beside = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        quality = 3 * rng.normal(size=200)
        mine = shown_pairs(rng, 200, first=0.2, quality=quality)
        others = [r for who in "yz" for r in shown_pairs(rng, 200, quality=quality, who=who)]
        alone.append(position_test(sheet_of(mine)))
        beside.append(position_test(sheet_of(mine + others), "x"))
        assert beside[-1].effect == pytest.approx(alone[-1].effect, abs=1e-12)
    assert np.mean([t.z for t in alone]) == pytest.approx(2.83, abs=0.6)
    assert np.mean([t.z for t in beside]) > np.mean([t.z for t in alone]) + 0.1


def test_leaning_of_one_against_the_others_cancels_quality():
    """Longer responses are better and everybody says so: that is no bias of x, who says what the others say."""
    rng = np.random.default_rng(1)
    quality = 2 * rng.normal(size=300)
    lengths = {f"{n}{name}": int(100 + 10 * (name == "a") * q) for n, q in enumerate(quality) for name in "ab"}
    rankings = [r for who in "xyz" for r in shown_pairs(rng, 300, quality=quality, who=who)]
    sheet = sheet_of(rankings)
    values = leanings(sheet, lengths)
    assert leaning_test(sheet, values).z > 10
    assert all(abs(leaning_test(sheet, values, who).z) < 3 for who in "xyz")
    known = ~np.isnan(values)
    mine = sheet.mine("x")[known]
    expected = values[known][mine].mean() - values[known][~mine].mean()
    assert leaning_test(sheet, values, "x").effect == pytest.approx(expected)


def test_models_by_hand():
    """Policy s wins two of three decided pairs against t; a pair within s is not counted."""
    policies = {"a": "s", "b": "t", "c": "s"}
    found = model_effect([make("abc", prompt="p"), make("ba", prompt="q")], policies)
    assert {name: estimate.value for name, estimate in found.items()} == {"s": 1 / 3, "t": 2 / 3}
    assert model_effect([make("ac")], policies) == {}


def test_length_logistic_is_the_maximum_likelihood():
    rng = np.random.default_rng(2)
    lengths = {f"{n}{name}": int(rng.integers(50, 500)) for n in range(300) for name in "ab"}
    quality = [np.log2(lengths[f"{n}a"] / lengths[f"{n}b"]) * 0.7 for n in range(300)]
    rankings = shown_pairs(rng, 300, quality=quality)
    found = length_logistic(rankings, lengths)
    ratios = np.array([np.log2(lengths[r.groups[0][0]] / lengths[r.groups[1][0]]) for r in rankings])
    best = scipy.optimize.minimize_scalar(lambda b: np.logaddexp(0, -b * ratios).sum(), bracket=(0, 1))
    assert found.effect == pytest.approx(best.x, abs=1e-6)
    assert found.effect == pytest.approx(0.7, abs=0.3) and found.p < 1e-4 and found.n == 300


def test_verbosity_is_what_length_wins_at_equal_quality():
    """Longer ones win because they are better: with quality held, length wins nothing."""
    rng = np.random.default_rng(3)
    size = rng.normal(size=600)
    lengths = {f"{n}{name}": 100 + (round(40 * s) if name == "a" else 0) for n, s in enumerate(size) for name in "ab"}
    rankings = shown_pairs(rng, 600, quality=2 * size)
    control = {f"{n}{name}": 2 * s * (name == "a") for n, s in enumerate(size) for name in "ab"}
    assert length_logistic(rankings, lengths).z > 8
    assert abs(length_logistic(rankings, lengths, control).z) < 3


def test_length_logistic_of_nothing():
    assert length_logistic([], {}) is None
    assert length_logistic([make("ab")], {"a": 5, "b": 5}) is None
    assert length_logistic([make("ab")], {"a": 9, "b": 5}) is None  # separated: the longer one always wins


def test_length_logistic_equals_the_reference():
    api = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(4)
    lengths = {f"{n}{name}": int(rng.integers(50, 500)) for n in range(200) for name in "abc"}
    rankings = [
        Ranking(
            prompt_id=f"p{n}",
            groups=tuple((f"{n}{name}",) for name in rng.permutation(list("abc"))),
            annotator="x",
            kind="human",
        )
        for n in range(200)
    ]
    rows = [(np.log2(lengths[a] / lengths[b]), r.prompt_id) for r in rankings for a, b in derive(r)]
    sign = np.where(np.arange(len(rows)) % 2 == 1, -1.0, 1.0)
    fitted = api.Logit(sign > 0, sign * np.array([x for x, _ in rows])).fit(
        disp=0, tol=1e-12, cov_type="cluster", cov_kwds={"groups": [p for _, p in rows], "use_correction": False}
    )
    found = length_logistic(rankings, lengths)
    assert found.effect == pytest.approx(fitted.params[0], abs=1e-8)
    # Ours has the small-sample factor C / (C - 1), that of the reference is switched off.
    assert found.z * np.sqrt(200 / 199) == pytest.approx(fitted.tvalues[0], abs=1e-6)
