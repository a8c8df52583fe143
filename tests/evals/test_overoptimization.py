import pytest

from trivium.evals.overoptimization import curve_points, read_points, summarise
from trivium.runs.events import EventLog


def test_points_come_from_what_the_run_logged(tmp_path):
    log = EventLog(tmp_path, "ppo-1")
    for step in (1, 2, 3):
        log.metric("rollout/kl", 0.5 * step, step)
        log.metric("rollout/score", float(step), step)
        if step != 2:
            log.metric("rollout/true_taste", 0.1 * step, step)
    log.metric("rollout/kl", 9.0, 4)
    log.close()
    assert read_points(tmp_path) == [
        {"step": 1.0, "kl": 0.5, "proxy": 1.0, "truth": pytest.approx(0.1)},
        {"step": 2.0, "kl": 1.0, "proxy": 2.0},
        {"step": 3.0, "kl": 1.5, "proxy": 3.0, "truth": pytest.approx(0.3)},
    ]


def test_a_proxy_that_rises_while_the_truth_falls_is_seen():
    steps = range(100)
    points = curve_points(
        {s: s / 10 for s in steps}, {s: s / 100 for s in steps}, {s: 1 - ((s - 45) / 50) ** 2 for s in steps}
    )
    found = summarise(points)
    assert len(found["points"]) == 10
    assert 3.5 < found["peak_kl"] < 5.5
    assert found["truth_lost"] > 0.5 and found["proxy_gained"] == pytest.approx(0.5)


def test_a_truth_that_only_rises_has_lost_nothing():
    steps = range(30)
    found = summarise(
        curve_points({s: float(s) for s in steps}, {s: float(s) for s in steps}, {s: float(s) for s in steps})
    )
    assert found["truth_lost"] == 0 == found["proxy_gained"]


def test_without_the_truth_only_the_curve_is_told():
    assert set(summarise(curve_points({1: 1.0}, {1: 2.0}, {}))) == {"points"}
    assert summarise([]) == {"points": []}
