"""Proxy and truth over the KL spent: does the learned reward still rise where the true taste falls?

Gao et al. 2023, "Scaling laws for reward model overoptimization". Read from what a PPO (or GRPO) run logged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.runs.events import read_metrics

PROXY, TRUTH, KL = "rollout/score", "rollout/true_taste", "rollout/kl"


def read_points(run_folder: Path) -> list[dict[str, float]]:
    """Return one point per logged round, in order: `step`, `kl` (nats per completion), `proxy`, and `truth` if known.

    Empty for a run that logged neither a KL nor a score.
    """
    curves = {name: dict(points) for name, points in read_metrics(run_folder).items() if name in (PROXY, TRUTH, KL)}
    return curve_points(curves.get(KL, {}), curves.get(PROXY, {}), curves.get(TRUTH, {}))


def curve_points(
    kl: Mapping[int, float], proxy: Mapping[int, float], truth: Mapping[int, float]
) -> list[dict[str, float]]:
    """Return the points of the steps at which both the KL and the proxy are known."""
    points = []
    for step in sorted(set(kl) & set(proxy)):
        point = {"step": float(step), "kl": kl[step], "proxy": proxy[step]}
        points.append(point | ({"truth": truth[step]} if step in truth else {}))
    return points


def summarise(points: Sequence[Mapping[str, float]], num_bins: int = 10) -> dict[str, Any]:
    """Return the curve in at most `num_bins` averaged stretches of training, and what it says.

    `points`: the averaged points. Where the truth is known, `peak_kl` is the KL at which the averaged truth is
    highest, `truth_lost` how far it has fallen from there by the end (0: the end is the peak), `proxy_gained` how much
    the proxy rose meanwhile. Both above 0 is over-optimisation; single rounds are too noisy to say so.
    """
    size = max(1, -(-len(points) // num_bins))
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    averaged = [
        {name: sum(p[name] for p in part) / len(part) for name in part[0] if all(name in p for p in part)}
        for part in bins
    ]
    known = [point for point in averaged if "truth" in point]
    if not known:
        return {"points": averaged}
    peak, last = max(known, key=lambda point: point["truth"]), known[-1]
    return {
        "points": averaged,
        "peak_kl": peak["kl"],
        "truth_lost": peak["truth"] - last["truth"],
        "proxy_gained": last["proxy"] - peak["proxy"],
    }
