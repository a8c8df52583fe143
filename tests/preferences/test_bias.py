import numpy as np
import pytest

from trivium.preferences.bias import length_effect, position_effect
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
