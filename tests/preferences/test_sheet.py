import numpy as np
import pytest
import scipy.stats

from trivium.preferences.sheet import cosine, leanings, sheet_of
from trivium.records import Ranking


def make(groups, annotator="x", prompt="p", shown=(), kind="human"):
    groups = tuple(map(tuple, groups))
    return Ranking(prompt_id=prompt, groups=groups, annotator=annotator, kind=kind, order_shown=tuple(shown))


def test_rows_by_hand():
    """b > a = c: midranks 1, 2.5, 2.5, so scores 1, -0.5, -0.5; shown c b a: places 1, 0, -1 in that order."""
    sheet = sheet_of([make(["b", "ac"], shown="cba"), make("abc", "y"), make("a"), make((), "z")])
    assert len(sheet) == 2 and sheet.annotators == ("x", "y")
    assert sheet.names[0] == ("a", "b", "c")
    assert sheet.scores[0].tolist() == [-0.5, 1, -0.5]
    assert sheet.places[0].tolist() == [-1, 0, 1]
    assert sheet.places[1] is None
    assert sheet.items.tolist() == [0, 0] and sheet.rows_of == [[0, 1]]
    assert sheet.mine("y").tolist() == [False, True]


def test_an_order_that_leaves_a_response_out_is_no_order():
    assert sheet_of([make("abc", shown="ab")]).places[0] is None
    # What else was on the screen does not matter: d was shown and not judged.
    assert sheet_of([make("ab", shown="bda")]).places[0].tolist() == [-0.5, 0.5]


def test_kinds_are_not_mixed_up():
    assert sheet_of([make("ab"), make("ba", kind="ai")]).annotators == ("x (ai)", "x (human)")


def test_other_responses_to_the_same_prompt_are_another_item():
    sheet = sheet_of([make("ab"), make("ac", "y"), make("ba", "z")])
    assert sheet.items.tolist() == [0, 1, 0] and sheet.prompts.tolist() == [0, 0, 0]
    assert sheet.agreements[0].tolist() == [[0, 2]] and sheet.agreements[1] == pytest.approx([-1])


@pytest.mark.parametrize("seed", range(5))
def test_agreements_and_leanings_are_spearmans_correlation(seed):
    rng = np.random.default_rng(seed)
    levels = rng.integers(3, size=(2, 5))
    names = "abcde"
    rankings = [
        make([[n for n, v in zip(names, row, strict=True) if v == level] for level in sorted(set(row))], who)
        for who, row in zip("xy", levels, strict=True)
    ]
    sheet = sheet_of(rankings)
    expected = scipy.stats.spearmanr(levels[0], levels[1]).statistic
    assert sheet.agreements[1][0] == pytest.approx(expected, abs=1e-12)
    numbers = dict(zip(names, rng.integers(4, size=5).tolist(), strict=True))
    expected = scipy.stats.spearmanr(-levels[0], [numbers[n] for n in names]).statistic
    assert leanings(sheet, numbers)[0] == pytest.approx(expected, abs=1e-12)


def test_ties_say_nothing_and_equal_numbers_are_not_asked():
    sheet = sheet_of([make(["ab"]), make("ab", "y")])
    assert sheet.agreements[1].tolist() == [0]
    assert leanings(sheet, {"a": 1, "b": 2}).tolist() == [0, -1]
    assert np.isnan(leanings(sheet, {"a": 2, "b": 2})).all()
    assert cosine(np.zeros(2), np.ones(2)) == 0


def test_residuals_are_what_the_others_do_not_foretell():
    """x and y agree on everything: nothing is left. Alone on an item, all of it is."""
    sheet = sheet_of([make("ab"), make("ab", "y"), make("cd"), make("cd", "y")])
    assert np.abs(np.concatenate(sheet.residuals)).max() == pytest.approx(0)
    alone = sheet_of([make("ab"), make("cd", "y")])
    assert [r.tolist() for r in alone.residuals] == [s.tolist() for s in alone.scores]
    # Three of four pairs agree: the slope is 1/2 (own times others 2 x (3 - 1) over 8), so half of it goes.
    half = [make("ab", "x", str(n)) for n in range(4)] + [make("ab" if n else "ba", "y", str(n)) for n in range(4)]
    assert sheet_of(half).residuals[3] == pytest.approx(np.array([0.25, -0.25]))
