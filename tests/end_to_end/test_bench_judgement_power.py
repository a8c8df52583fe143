"""`bench/judgement_power.py`: what is wrong is found about as often as the formulas expect, and nothing else is.

In CI few collections, and bars that a right screening misses less than once in a thousand runs of new seeds; the whole
table's bars (power at least 0.9, false alarms at most 5%) in the slow test.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("bench_judgement_power", ROOT / "bench" / "judgement_power.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_judgement_power"] = module
    spec.loader.exec_module(module)
    return module


def case_of(bench, **values):
    return bench.Case(name="", **values)


def test_the_formulas_constants_by_hand(bench):
    # Noise of 1/3 of the quality's variance: 1/2 + asin(3/4) / pi = 0.770 of pairs alike; for pairs r is 2 * that - 1.
    assert bench.rank_correlation(2) == pytest.approx(2 * (0.5 + math.asin(0.75) / math.pi) - 1)
    assert bench.quantile(0.025) == pytest.approx(1.959964, abs=1e-6)


def test_simulated_annotators_agree_as_the_formulas_say(bench):
    """4,000 rankings of 4 by two: the mean Spearman correlation, within three standard errors (about 0.4 / 63)."""
    rankings, _ = bench.simulate(case_of(bench, prompts=4000, people=2, k=4), np.random.default_rng(0))
    by_prompt = {}
    for ranking in rankings:
        by_prompt.setdefault(ranking.prompt_id, []).append([name for (name,) in ranking.groups])
    places = [[[order.index(n) for n in sorted(order)] for order in pair] for pair in by_prompt.values()]
    found = np.mean([scipy.stats.spearmanr(*pair).statistic for pair in places[:1500]])
    assert found == pytest.approx(bench.rank_correlation(4), abs=0.035)


def test_ten_points_of_bias_are_sixty_to_forty(bench):
    """Of 3,000 pairs the one shown first, or the longer one, wins 60%, within three standard errors."""
    for fault in ("position", "length"):
        case = case_of(bench, prompts=3000, people=1, k=2, fault=fault, share=0.2)
        rankings, lengths = bench.simulate(case, np.random.default_rng(1))
        if fault == "position":
            wins = [r.groups[0][0] == r.order_shown[0] for r in rankings]
        else:
            wins = [lengths[r.groups[0][0]] > lengths[r.groups[1][0]] for r in rankings]
        assert np.mean(wins) == pytest.approx(0.6, abs=0.027)


@pytest.mark.parametrize(
    ("fault", "share", "who", "prompts"),
    [("position", 0.2, None, 100), ("position", 0.2, 0, 300), ("length", 0.2, 0, 300), ("chance", 0.3, 0, 300),
     ("chance", 1.0, 0, 100)],
)  # fmt: skip
def test_what_is_wrong_is_found_in_rankings_of_four(bench, fault, share, who, prompts):
    """The formulas expect over 99%: of 6 collections all but one at least (less comes once in 700 runs)."""
    case = case_of(bench, prompts=prompts, people=3, k=4, fault=fault, share=share, who=who)
    assert bench.expected_power(case) > 0.99
    assert bench.measure(case, 6, 0)["rate"] >= 5 / 6


def test_false_alarms_are_rare(bench):
    """At 5%, more than 7 of 50 collections would come once in 300 times."""
    assert bench.measure(case_of(bench, prompts=60, people=3, k=4), 50, 1)["rate"] <= 7 / 50
    assert scipy.stats.binom.sf(7, 50, 0.05) < 4e-3


def test_the_table_is_printed_and_written(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "cases", lambda: [case_of(bench, prompts=30, people=1, k=2, fault="length", share=1.0)])
    words = ["--collections", "2", "--nulls", "2", "--results", str(tmp_path / "power.json")]
    monkeypatch.setattr(sys, "argv", ["judgement_power.py", *words])
    bench.main()
    rows = json.loads((tmp_path / "power.json").read_text())["rows"]
    assert [(row["collections"], row["judgements"]) for row in rows] == [(2, 30), (2, 30)]
    assert rows[0]["rate"] == 1.0
    assert "| 2 | 30 x 1 | 30 |" in capsys.readouterr().out


@pytest.mark.slow  # about 15 minutes of one core
def test_the_whole_table_meets_its_bars(bench):
    """Biases of 10 points and 30% spam at 300 rankings of 4: power at least 0.9; nothing wrong: at most 5% alarms."""
    for case in bench.cases():
        row = bench.measure(case, 200, 0)
        if case.k == 4 and case.share >= 0.2:
            assert row["rate"] >= 0.9, case
        spread = 3 * math.sqrt(row["expected"] * (1 - row["expected"]) / 200) + 0.05
        assert abs(row["rate"] - row["expected"]) < spread + 0.05, case
    for case in bench.nulls():
        assert bench.measure(case, 1000, 1)["rate"] <= 0.05, case
