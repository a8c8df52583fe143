import itertools

import numpy as np
import pytest

from trivium.preferences.conduct import (
    FASTEST,
    circular_triads,
    consistence,
    drift,
    haste,
    intransitivity,
    majority_pairs,
)
from trivium.preferences.sheet import sheet_of
from trivium.records import Ranking


def make(groups, annotator="x", prompt="p", seconds=0.0):
    return Ranking(
        prompt_id=prompt, groups=tuple(map(tuple, groups)), annotator=annotator, kind="human", seconds=seconds
    )


def test_circles_by_hand():
    assert circular_triads(["ab", "bc", "ca"]).circular == 1
    straight = circular_triads(["ab", "bc", "ac"])
    assert (straight.circular, straight.decided, straight.expected) == (0, 1, 0.25)
    assert circular_triads(["ab", "bc"]).decided == 0
    # Said both ways, ac is undecided; said twice one way and once the other, it is decided.
    assert circular_triads(["ab", "bc", "ca", "ac"]).decided == 0
    assert circular_triads(["ab", "bc", "ca", "ca", "ac"]).circular == 1
    assert circular_triads([]).decided == 0


@pytest.mark.parametrize("seed", range(5))
def test_circles_are_those_found_by_looking_and_by_kendalls_formula(seed):
    rng = np.random.default_rng(seed)
    names = "abcdefg"
    pairs = [(a, b) if rng.random() < 0.5 else (b, a) for a, b in itertools.combinations(names, 2)]
    beats = set(pairs)
    looked = sum(
        {(x, y), (y, z), (z, x)} <= beats or {(y, x), (z, y), (x, z)} <= beats
        for x, y, z in itertools.combinations(names, 3)
    )
    wins = [sum(a == name for a, _ in pairs) for name in names]
    found = circular_triads(pairs)
    assert found.circular == looked == 7 * 6 * 13 / 12 - sum(w * w for w in wins) / 2
    assert found.decided == 35
    # A third of the pairs left out: still every circle that is there, and no other.
    some = [pair for pair in pairs if rng.random() < 0.67]
    beats = set(some)
    decided = [t for t in itertools.combinations(names, 3)
               if all((a, b) in beats or (b, a) in beats for a, b in itertools.combinations(t, 2))]  # fmt: skip
    looked = sum({(x, y), (y, z), (z, x)} <= beats or {(y, x), (z, y), (x, z)} <= beats for x, y, z in decided)
    assert (circular_triads(some).circular, circular_triads(some).decided) == (looked, len(decided))


def test_coins_go_round_in_a_quarter_of_triads():
    """2,000 triads decided by coins: a quarter, with a standard error of 1%."""
    rng = np.random.default_rng(0)
    rankings = [
        make(pair if rng.random() < 0.5 else pair[::-1], prompt=f"p{n}")
        for n in range(2000)
        for pair in (["a", "b"], ["b", "c"], ["a", "c"])
    ]
    found = intransitivity(rankings)["x"]
    assert found.decided == 2000 and found.expected == 500
    assert found.circular / found.decided == pytest.approx(0.25, abs=0.03)


def test_consistence_of_the_extremes():
    assert consistence(0, 7) == 1
    assert consistence(14, 7) == 0  # the most there can be of seven: (343 - 7) / 24
    assert consistence(2, 4) == 0
    assert np.isnan(consistence(0, 2))


def test_a_ranking_of_three_is_no_witness():
    """It decides three pairs, but could not have contradicted itself."""
    assert intransitivity([make("abc")]) == {}
    assert intransitivity([make("abc"), make("ab"), make("bc"), make("ca")])["x"].circular == 1


def test_annotators_and_prompts_are_kept_apart():
    around = [make("ab"), make("bc", "y"), make("ca"), make("bc", prompt="q")]
    assert {name: t.decided for name, t in intransitivity(around).items()} == {"x": 0, "y": 0}


def test_majorities_of_pairs():
    votes = [make("ab"), make("ab", "y"), make("ba", "z"), make("cd"), make("dc", "y")]
    assert majority_pairs(votes) == [("a", "b")]


def test_drift_is_a_fall_of_agreement_over_time():
    """y agrees with x on the first 40 pairs and answers by coin from then on; z goes on."""
    rng = np.random.default_rng(1)
    rankings = []
    for n in range(80):
        pair = [[f"{n}a"], [f"{n}b"]]
        rankings += [make(pair, "x", f"p{n}"), make(pair, "z", f"p{n}")]
        rankings.append(make(pair if n < 40 or rng.random() < 0.5 else pair[::-1], "y", f"p{n}"))
    sheet = sheet_of(rankings)
    assert drift(sheet, "y").effect < -0.3 and drift(sheet, "y").p < 0.01
    constant = sheet_of([make([[f"{n}a"], [f"{n}b"]], who, f"p{n}") for n in range(40) for who in "xy"])
    assert np.isnan(drift(constant, "x").p)


def test_answers_that_nobody_can_have_read():
    """x takes 10 seconds for 200 characters but on ten prompts one; on those, x is a coin and y is not."""
    lengths = {f"{n}{name}": 100 for n in range(40) for name in "ab"}
    rankings = []
    for n in range(40):
        pair = [[f"{n}a"], [f"{n}b"]]
        hurried = n < 10
        rankings.append(make(pair[::-1] if hurried and n % 2 else pair, "x", f"p{n}", 1.0 if hurried else 10.0))
        rankings.append(make(pair, "y", f"p{n}", 20.0))
    found = haste(rankings, lengths)
    assert found["x"].share.value == 0.25 and found["x"].share.n == 40
    assert found["x"].characters_per_s == 20 and found["y"].characters_per_s == 10
    assert found["x"].cost.effect == pytest.approx(-1.0)  # five of ten agree: 0 on average, against 1
    assert found["x"].cost.p < 0.01
    assert found["y"].share.value == 0 and np.isnan(found["y"].cost.p)
    assert FASTEST == 100


def test_times_that_were_not_recorded_are_not_fast():
    assert haste([make("ab"), make("ab", "y")], {"a": 5, "b": 5}) == {}
