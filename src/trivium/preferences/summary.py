"""What a lead wants to know of a collection, as plain dicts: agreement, disputed items, pace and reliability."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trivium.preferences.agreement import Estimate, agreement, concordance, retest
from trivium.preferences.bias import length_effect, position_effect
from trivium.preferences.conduct import haste, intransitivity, with_others
from trivium.preferences.qualification import pairs_right
from trivium.preferences.reliability import reliability
from trivium.preferences.screening import screen
from trivium.preferences.sheet import Sheet, sheet_of
from trivium.preferences.store import Store
from trivium.preferences.store.rows import to_ranking
from trivium.records import AnnotatorKind, Ranking, to_dict

DISPUTED = 20
"""Items listed as disputed, the worst first."""


def collection_summary(
    store: Store, collection: str, *, kind: AnnotatorKind = "human", seed: int = 0
) -> dict[str, Any]:
    """Return a collection's judgements of one kind for a lead's review, JSON-ready; None where a thing is undefined.

    `progress`; `agreement` (pairwise, alpha, tau_b, ceiling, concordance, each with value, low, high, n); `annotators`,
    one dict each (rankings, mean seconds, agreement with others, reliability, circles, haste, share of known answers
    right); `disputed`, the items whose annotators agree the least; `retest`, how stable annotators are with the
    questions that came back to them;
    `bias` and `findings`, the screening's answers with their alarms. What a lead decided since is left out.
    """
    rows = sorted(
        store.ranking_rows(collection, (kind,), ("rank",), adjudicated=False), key=lambda row: row["sequence"]
    )
    rankings = [to_ranking(row) for row in rows]
    sheet = sheet_of(rankings)
    names = {name for ranking in rankings for group in ranking.groups for name in group}
    completions = store.completions(names)
    lengths = {name: len(completion.text) for name, completion in completions.items()}
    policies = {name: completion.policy for name, completion in completions.items()}
    found = agreement(rankings, seed=seed)
    known = known_answers(store, collection, kind)
    return {
        "collection": collection,
        "kind": kind,
        "progress": to_dict(store.progress(collection, kind)),
        "agreement": {**to_dict(found), "concordance": _estimate(concordance(rankings, seed=seed))},
        "retest": to_dict(retest(with_repeats(store, collection, kind), seed=seed)),
        "annotators": [
            each | {"known_right": known.get(each["annotator"])}
            for each in annotators(rankings, sheet, lengths, seed=seed)
        ],
        "disputed": disputed(sheet, rankings),
        "bias": {
            "position": _estimate(position_effect(rankings, seed=seed)),
            "length": _estimate(length_effect(rankings, lengths, seed=seed)),
        },
        "findings": [
            {**to_dict(finding), "alarm": finding.alarm}
            for finding in screen(rankings, lengths, policies, in_order_of_time=True)
        ],
    }


def annotators(
    rankings: Sequence[Ranking], sheet: Sheet, lengths: Mapping[str, int], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Return a dict for each annotator, by name."""
    measured, circles, hurried = reliability(rankings), intransitivity(rankings), haste(rankings, lengths, seed=seed)
    found = []
    for name in sorted({ranking.annotator for ranking in rankings}):
        mine = [ranking for ranking in rankings if ranking.annotator == name]
        timed = [ranking.seconds for ranking in mine if ranking.seconds > 0]
        agreed = with_others(sheet, name)[1] if name in sheet.annotators else np.zeros(0)
        found.append(
            {
                "annotator": name,
                "rankings": len(mine),
                "mean_seconds": float(np.mean(timed)) if timed else None,
                "agreement_with_others": float(agreed.mean()) if len(agreed) else None,
                "reliability": to_dict(measured[name]) if measured[name].pairs else None,
                "circular_triads": to_dict(circles[name]) if name in circles else None,
                "too_fast": _estimate(hurried[name].share) if name in hurried else None,
            }
        )
    return found


def disputed(sheet: Sheet, rankings: Sequence[Ranking], *, most: int = DISPUTED) -> list[dict[str, Any]]:
    """Return the items whose annotators contradict each other (mean rank correlation below 0), the worst first."""
    pairs, values = sheet.agreements
    by_item: dict[int, list[float]] = defaultdict(list)
    for (first, _), value in zip(pairs.tolist(), values.tolist(), strict=True):
        by_item[int(sheet.items[first])].append(value)
    judged = [ranking for ranking in rankings if sum(map(len, ranking.groups)) >= 2]
    worst = sorted((float(np.mean(found)), item) for item, found in by_item.items() if np.mean(found) < 0)
    return [
        {
            "prompt_id": judged[sheet.rows_of[item][0]].prompt_id,
            "agreement": value,
            "rankings": [
                {"annotator": judged[row].annotator, "groups": [list(group) for group in judged[row].groups]}
                for row in sheet.rows_of[item]
            ],
        }
        for value, item in worst[:most]
    ]


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    return to_dict(estimate) if estimate else None


def known_answers(store: Store, collection: str, kind: AnnotatorKind = "human") -> dict[str, float]:
    """Return the share of pairs right on gold and qualification questions, by annotator."""
    scores: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for row in store.ranking_rows(collection, (kind,), purposes=("gold", "qualify")):
        scores[row["annotator"]].append(pairs_right(row["groups"], row["gold"]))
    totals = {name: (sum(r for r, _ in found), sum(n for _, n in found)) for name, found in scores.items()}
    return {name: right / total for name, (right, total) in totals.items() if total}


def with_repeats(store: Store, collection: str, kind: AnnotatorKind = "human") -> list[Ranking]:
    """Return each annotator's first and repeated judgement of every task that came back to them."""
    again = store.ranking_rows(collection, (kind,), purposes=("repeat",))
    asked = {(row["repeat_of"], row["annotator"]) for row in again}
    first = store.ranking_rows(collection, (kind,), ("rank",), adjudicated=False)
    originals = [row for row in first if (row["task_id"], row["annotator"]) in asked]
    return [to_ranking(row) for row in [*originals, *again]]
