import pytest

from trivium.evals.emergence import few_shot_gain, in_context_gain, steps_gain
from trivium.evals.perplexity import DocumentLoss


def test_in_context_gain_by_hand():
    cheaper = DocumentLoss(nats=tuple([3.0] * 40 + [1.0] * 60), num_bytes=300)
    same = DocumentLoss(nats=tuple([2.0] * 100), num_bytes=300)
    short = DocumentLoss(nats=tuple([9.0] * 63), num_bytes=200)
    (mean, low, high), count = in_context_gain([cheaper, same, short])
    assert (mean, count) == (1.0, 2) and low < mean < high
    assert in_context_gain([short])[1] == 0


def test_few_shot_gain_is_paired():
    assert few_shot_gain([1.0, 1.0, 0.0], [0.0, 1.0, 0.0], 0)[0] == pytest.approx(1 / 3)


def test_steps_are_set_against_the_same_task_without():
    grades = {"sums@1": [0.0] * 30 + [1.0] * 10, "sums_steps@1": [1.0] * 40, "facts@1": [1.0], "sums_steps@2": [0.0]}
    gains = steps_gain(grades, 0)
    assert set(gains) == {"sums@1"}
    assert gains["sums@1"][0] == pytest.approx(0.75) and 0.55 < gains["sums@1"][1] < gains["sums@1"][2] < 0.9
