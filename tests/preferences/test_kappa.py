import numpy as np
import pytest

from trivium.preferences.kappa import cohen_kappa, fleiss_kappa, label_counts


def test_cohen_by_hand():
    # 20 both yes, 5 only the first, 10 only the second, 15 both no: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    found = cohen_kappa(first, second)
    assert found.value == pytest.approx(0.4, abs=1e-12)
    assert found.low < 0.4 < found.high and found.n == 50


def test_cohen_of_perfection_chance_and_nothing():
    assert cohen_kappa("abab", "abab").value == 1
    assert cohen_kappa("aabb", "abab").value == pytest.approx(0)
    assert cohen_kappa("aaaa", "aaaa") is None
    assert cohen_kappa([], []) is None
    with pytest.raises(ValueError, match="2 labels of the first"):
        cohen_kappa("ab", "a")


def test_fleiss_by_hand():
    """Three raters, two labels: items (3, 0), (2, 1), (0, 3). Equal pairs 1, 1/3, 1; shares of labels 5/9 and 4/9."""
    observed, expected = (1 + 1 / 3 + 1) / 3, (5 / 9) ** 2 + (4 / 9) ** 2
    found = fleiss_kappa(np.array([[3.0, 0], [2, 1], [0, 3]]))
    assert found.value == pytest.approx((observed - expected) / (1 - expected), abs=1e-12)


def test_fleiss_of_two_raters_is_scotts_pi():
    """With two raters of the same habits, Fleiss' and Cohen's chance levels are the same."""
    first, second = "aabbab", "abbaab"
    counts = label_counts([{"x": a, "y": b} for a, b in zip(first, second, strict=True)])
    assert fleiss_kappa(counts).value == pytest.approx(cohen_kappa(first, second).value, abs=1e-12)


def test_items_of_one_rater_say_nothing():
    counts = np.array([[3.0, 0], [2, 1], [0, 3]])
    assert fleiss_kappa(np.vstack([counts, [[0, 1.0]]])).value == fleiss_kappa(counts).value
    assert fleiss_kappa(np.array([[2.0, 0], [2, 0]])) is None
    assert label_counts([{"x": "a"}, {"x": "b", "y": "a"}]).tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("seed", range(3))
def test_both_equal_the_reference(seed):
    reference = pytest.importorskip("statsmodels.stats.inter_rater")
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=(60, 3))
    labels[:, 1] = np.where(rng.random(60) < 0.6, labels[:, 0], labels[:, 1])
    counts, _ = reference.aggregate_raters(labels)
    assert fleiss_kappa(counts.astype(float)).value == pytest.approx(reference.fleiss_kappa(counts), abs=1e-12)
    table = np.zeros((4, 4))
    np.add.at(table, (labels[:, 0], labels[:, 1]), 1)
    expected = reference.cohens_kappa(table, return_results=False)
    assert cohen_kappa(labels[:, 0].tolist(), labels[:, 1].tolist()).value == pytest.approx(expected, abs=1e-12)
