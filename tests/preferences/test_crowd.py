import choix
import numpy as np
import pytest
import scipy.optimize

from trivium.preferences.crowd import crowd_bradley_terry, voted_pairs
from trivium.records import Ranking


def contests(rng, strengths, skills, num):
    """Return (annotator, chosen, rejected): verdicts by the strengths, or with chance 1 - skill their contrary."""
    names = sorted(strengths)
    pairs = []
    for _ in range(num):
        who = str(rng.choice(sorted(skills)))
        a, b = rng.choice(names, size=2, replace=False).tolist()
        better = rng.random() < 1 / (1 + np.exp(strengths[b] - strengths[a]))
        if rng.random() >= skills[who]:
            better = not better
        pairs.append((who, a, b) if better else (who, b, a))
    return pairs


STRENGTHS = {"a": 2.0, "b": 1.0, "c": 0.0, "d": -1.0, "e": -2.0}


@pytest.mark.parametrize("penalty", [0.01, 0.1, 1.0])
def test_without_skills_it_is_bradley_terry_as_choix_fits_it(penalty):
    pairs = contests(np.random.default_rng(0), STRENGTHS, {"x": 1.0}, 200)
    found = crowd_bradley_terry(pairs, penalty=penalty, skilled=False)
    data = [("abcde".index(chosen), "abcde".index(rejected)) for _, chosen, rejected in pairs]
    expected = choix.opt_pairwise(5, data, alpha=penalty, method="Newton-CG", tol=1e-12)
    assert [found.scores[name] for name in "abcde"] == pytest.approx(expected, abs=1e-6)
    assert found.skills == {"x": 1.0} and found.converged


def test_two_responses_by_hand():
    """Three wins against one, hardly any penalty: the scores are log 3 apart, around zero."""
    found = crowd_bradley_terry([("x", "a", "b")] * 3 + [("x", "b", "a")], penalty=1e-9, skilled=False)
    assert found.scores["a"] - found.scores["b"] == pytest.approx(np.log(3), abs=1e-6)
    assert found.scores["a"] + found.scores["b"] == pytest.approx(0, abs=1e-6)


def test_em_stops_where_the_penalised_likelihood_is_greatest():
    """A general optimiser, started there, finds nothing better; the gradient is zero in every direction."""
    rng = np.random.default_rng(1)
    pairs = contests(rng, STRENGTHS, {"x": 0.95, "y": 0.8, "z": 0.5}, 400)
    found = crowd_bradley_terry(pairs, penalty=0.1, tolerance=1e-14, most_iterations=5000)
    things, people = sorted(found.scores), sorted(found.skills)

    def loss(theta):
        s = dict(zip(things, theta[:5], strict=True))
        eta = dict(zip(people, 1 / (1 + np.exp(-theta[5:])), strict=True))
        total = 0.1 * float(theta[:5] @ theta[:5]) - sum(np.log(e * (1 - e)) for e in eta.values())
        for who, a, b in pairs:
            p = 1 / (1 + np.exp(s[b] - s[a]))
            total -= np.log(eta[who] * p + (1 - eta[who]) * (1 - p))
        return float(total)

    skills = np.array([found.skills[name] for name in people])
    here = np.concatenate([[found.scores[name] for name in things], np.log(skills / (1 - skills))])
    assert loss(here) == pytest.approx(-found.log_likelihood, abs=1e-9)
    best = scipy.optimize.minimize(loss, here, method="BFGS", options={"gtol": 1e-7})
    assert loss(here) - best.fun < 1e-8
    assert here == pytest.approx(best.x, abs=1e-3)


def test_skills_are_found_and_a_contrary_one_is_used_upside_down():
    rng = np.random.default_rng(2)
    skills = {"good": 0.97, "fair": 0.8, "coin": 0.5, "contrary": 0.1}
    pairs = contests(rng, STRENGTHS, skills, 4000)
    found = crowd_bradley_terry(pairs)
    assert found.converged
    for name, skill in skills.items():
        # 1,000 verdicts each; the standard error of a skill is about 0.03 here, because close pairs tell little.
        assert found.skills[name] == pytest.approx(skill, abs=0.1)
    assert sorted(found.scores, key=found.scores.__getitem__) == list("edcba")


def test_responses_that_nobody_compared_do_not_disturb_each_other():
    """Two prompts fitted at once give what each gives alone, also where their numbers of responses differ."""
    rng = np.random.default_rng(3)
    one = contests(rng, STRENGTHS, {"x": 1.0}, 60)
    two = [("x", f"2{a}", f"2{b}") for _, a, b in contests(rng, {"f": 1.0, "g": 0.0, "h": -1.0}, {"x": 1.0}, 40)]
    three = [("x", f"3{a}", f"3{b}") for _, a, b in contests(rng, {"f": 0.0, "g": 0.0, "h": 1.0}, {"x": 1.0}, 40)]
    together = crowd_bradley_terry(one + two + three, skilled=False).scores
    for alone in (one, two, three):
        for name, score in crowd_bradley_terry(alone, skilled=False).scores.items():
            assert together[name] == pytest.approx(score, abs=1e-8)


def test_verdicts_of_rankings_by_hand():
    rankings = [Ranking(prompt_id="p", groups=(("a",), ("b", "c")), annotator="x", kind="human")]
    assert voted_pairs(rankings) == [("x", "a", "b"), ("x", "a", "c")]
