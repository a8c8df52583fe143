"""Are bad judgements found out? Power and false alarms of the screening: `bootstrap.py bench judgement_power`.

SIMULATED annotators rank K responses of random quality; into some collections a bias or a spammer is put. Counted is
how often `preferences.screening` raises the right alarm, and in collections where nothing is wrong how often any.
Beside each stands the power that the formulas below expected. Writes bench/results/judgement_power.json.

A bias of 10 points: a share of 20% of the judgements is by the place (the length) alone, so of two responses the one
shown first (the longer one) wins 60% where 50% is fair. 5 points: 10% of the judgements, 55%.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trivium.evals.stats import wilson_interval
from trivium.preferences.screening import ALPHA, screen
from trivium.records import Ranking, atomic_write

ROOT = Path(__file__).resolve().parents[1]
NOISE = math.sqrt(1 / 3)
"""Noise over quality: two annotators then agree on 77% of pairs, as the demo's do."""
LATENT = 1 / (1 + NOISE**2)
"""The correlation of two annotators' opinions of a response."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is simulated: `prompts` prompts of `k` responses, each ranked by all of `people` annotators.

    `share` of the judgements of the annotators `who` (None: of all) is by the `fault`: position, length or chance.
    `found` names the question that should raise the alarm.
    """

    name: str
    prompts: int
    people: int
    k: int
    fault: str = ""
    share: float = 0.0
    who: int | None = None

    @property
    def question(self) -> str:
        """The question whose alarm is the right one."""
        return {"chance": "agreement"}.get(self.fault, self.fault)


def simulate(case: Case, rng: np.random.Generator) -> tuple[list[Ranking], dict[str, int]]:
    """Return one collection's rankings and its responses' lengths, which have nothing to do with quality."""
    rankings: list[Ranking] = []
    lengths: dict[str, int] = {}
    for prompt in range(case.prompts):
        names = [f"{prompt}-{i}" for i in range(case.k)]
        quality = rng.normal(size=case.k)
        size = rng.permutation(case.k) * 40 + rng.integers(40, 80, size=case.k)
        lengths.update(zip(names, size.tolist(), strict=True))
        for person in range(case.people):
            shown = rng.permutation(case.k)
            utility = quality + NOISE * rng.normal(size=case.k)
            if rng.random() < case.share and case.who in (None, person):
                if case.fault == "position":
                    utility = -np.argsort(shown).astype(float)
                else:
                    utility = size.astype(float) if case.fault == "length" else rng.normal(size=case.k)
            order = np.argsort(-utility)
            rankings.append(
                Ranking(
                    prompt_id=str(prompt),
                    groups=tuple((names[i],) for i in order),
                    annotator=f"sim-{person}",
                    kind="simulated",
                    order_shown=tuple(names[i] for i in shown),
                )
            )
    return rankings, lengths


def alarms(case: Case, seed: int, number: int) -> list[tuple[str, str | None]]:
    """Return which questions raised an alarm in simulated collection `number`."""
    rankings, lengths = simulate(case, np.random.default_rng([seed, number, case.prompts, case.k]))
    return [(f.question, f.annotator) for f in screen(rankings, lengths) if f.alarm]


def rank_correlation(k: int) -> float:
    """Return the expected Spearman correlation of two annotators' rankings of k responses (Moran 1948)."""
    return 6 / (math.pi * (k + 1)) * (math.asin(LATENT) + (k - 2) * math.asin(LATENT / 2))


def expected_power(case: Case) -> float:
    """Return the power to be expected, with the first step of Holm's correction as the threshold.

    position: z = q sqrt(n (K - 1) / (1 - R^2)), R^2 what the others' mean ranking foretells of one. length: the same
    with n divided by the design effect 1 + (m - 1) r over all; of one annotator against the others, with the variance
    of a difference, 1 + (1 + (m - 2) r) / (m - 1) - 2 (1 - q) r. chance: the fall of the agreement, q r, over its
    standard error.
    """
    r, m, q = rank_correlation(case.k), case.people, case.share
    others = m - 1
    per_ranking = case.k - 1
    if case.who is None:
        between = (1 - q) ** 2 * r
        n = case.prompts * m
        if case.fault == "position":
            z = q * math.sqrt(n * per_ranking / (1 - between**2 * others / (1 + (others - 1) * between)))
        else:
            z = q * math.sqrt(n * per_ranking / (1 + others * between))
        # Half is for the two questions about all (everything, where there is one annotator); two sides.
        threshold = quantile(ALPHA / (2 if m > 1 else 1) / 2 / 2)
    else:
        n, sides = case.prompts, 2
        asked = 3 * m
        if case.fault == "position":
            own = (1 - q) * r
            z = q * math.sqrt(n * per_ranking / (1 - own**2 * others / (1 + (others - 1) * r)))
        elif case.fault == "length":
            variance = 1 + (1 + (others - 1) * r) / others - 2 * (1 - q) * r
            z = q * math.sqrt(n * per_ranking / variance)
        else:
            z, sides = q * r * math.sqrt(n / agreement_variance(case)), 1
        threshold = quantile(ALPHA / 2 / asked / sides)
    return 0.5 * math.erfc((threshold - z) / math.sqrt(2))


def agreement_variance(case: Case) -> float:
    """Return the variance, per prompt, of the mean agreement of pairs with one annotator less that of pairs without.

    By a simulation of its own, since rank correlations of few responses are far from normal.
    """
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(20_000, 1, case.k)) + NOISE * rng.normal(size=(20_000, case.people, case.k))
    spam = rng.random(20_000) < case.share
    latent[spam, 0] = rng.normal(size=(int(spam.sum()), case.k))
    ranks = np.argsort(np.argsort(latent, axis=2), axis=2) - (case.k - 1) / 2
    gram = np.einsum("nik,njk->nij", ranks, ranks) / (ranks[0, 0] @ ranks[0, 0])
    upper = np.triu_indices(case.people, 1)
    with_first = np.array(upper[0]) == 0
    pairs = gram[:, upper[0], upper[1]]
    without = pairs[:, ~with_first].mean(axis=1) if (~with_first).any() else 0.0
    return float(np.var(pairs[:, with_first].mean(axis=1) - without))


def quantile(p: float) -> float:
    """Return the z that a standard normal number exceeds with chance p, by bisection."""
    low, high = 0.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * math.erfc(middle / math.sqrt(2)) > p else (low, middle)
    return low


def cases() -> list[Case]:
    """Return the table's rows: 300 judgements in all, and 300 of the annotator in question."""
    found = []
    for k in (4, 2):
        for fault in ("position", "length"):
            for share in (0.2, 0.1):
                name = f"all annotators: {fault}, {share * 50:.0f} points"
                found.append(Case(name=name, prompts=100, people=3, k=k, fault=fault, share=share))
        name = "one of three answers by chance"
        found.append(Case(name=name, prompts=100, people=3, k=k, fault="chance", share=1.0, who=0))
        for fault, share in (("position", 0.2), ("position", 0.1), ("length", 0.2), ("length", 0.1), ("chance", 0.3)):
            what = f"{fault}, {share * 50:.0f} points" if fault != "chance" else "30% of answers by chance"
            name = f"one annotator: {what}"
            found.append(Case(name=name, prompts=300, people=3, k=k, fault=fault, share=share, who=0))
    for fault in ("position", "length"):
        name = f"the only annotator: {fault}, 10 points"
        found.append(Case(name=name, prompts=300, people=1, k=2, fault=fault, share=0.2))
    return found


def nulls() -> list[Case]:
    """Return the collections in which nothing is wrong, one for each design of the table."""
    designs = sorted({(case.prompts, case.people, case.k) for case in cases()}, key=lambda d: (-d[2], d))
    return [Case(name="nothing is wrong", prompts=p, people=a, k=k) for p, a, k in designs]


def measure(case: Case, num: int, seed: int) -> dict[str, Any]:
    """Return a row: how often the right alarm was raised in `num` collections, or any where nothing is wrong."""
    who = None if case.who is None else f"sim-{case.who}"
    raised = [alarms(case, seed, number) for number in range(num)]
    hits = sum(((case.question, who) in found) if case.fault else bool(found) for found in raised)
    low, high = wilson_interval(hits, num)
    return {
        "case": case.name, "prompts": case.prompts, "annotators": case.people, "k": case.k,
        "judgements": case.prompts * (case.people if case.who is None else 1), "collections": num,
        "expected": expected_power(case) if case.fault else ALPHA, "rate": hits / num, "low": low, "high": high,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| what is wrong | K | prompts x annotators | judgements | expected, % | alarm raised, % (95%) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["case"], row["k"], f"{row['prompts']} x {row['annotators']}", row["judgements"]]
        bound = "at most " if row["case"].startswith("nothing") else ""
        cells.append(f"{bound}{100 * row['expected']:.0f}")
        cells.append(f"{100 * row['rate']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Simulate, print the table, write the results."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--collections", type=int, default=200, help="simulated collections for each fault")
    options.add_argument("--nulls", type=int, default=1000, help="simulated collections with nothing wrong, per design")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "judgement_power.json")
    chosen = options.parse_args()
    # The seed of those with nothing wrong is another, so that they are not the same collections without their fault.
    work = [(case, chosen.collections, chosen.seed) for case in cases()]
    work += [(case, chosen.nulls, chosen.seed + 1) for case in nulls()]
    rows = []
    for case, num, seed in work:
        rows.append(measure(case, num, seed))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(chosen.results, json.dumps({"seed": chosen.seed, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
