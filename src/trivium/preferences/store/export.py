"""The way out: rankings as JSON Lines in the field's schemas, and as one digest.

`rankings` keeps all that is known; `pairs` is what preference trainers read (prompt, chosen, rejected); `unpaired` is
KTO's (prompt, completion, label).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.records import Completion, Conversation, Ranking, write_jsonl


def digest(rankings: Iterable[Ranking]) -> str:
    """Return the SHA-256 over the sorted canonical rankings.

    Who preferred what counts, and among which responses; when, how long it took and why do not, and neither does the
    order in which tied responses were named.
    """
    lines = sorted(
        json.dumps(
            [
                ranking.prompt_id,
                [sorted(group) for group in ranking.groups],
                ranking.annotator,
                ranking.kind,
                ranking.none_acceptable,
                *([sorted(ranking.soft)] if ranking.soft else []),
            ]
        )
        for ranking in rankings
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    prompts: Mapping[str, Conversation],
    completions: Mapping[str, Completion],
) -> int:
    """Write one line per ranking and return how many: `prompt` as messages, `responses` as texts, `ranking` as groups.

    A group holds places in `responses`, counted from 0, best group first; a tie shares a group. Where the judge said
    how sure it was, `soft` holds [first, second, probability that the first is better], first and second as places.
    """

    def line(row: Mapping[str, Any]) -> dict[str, Any]:
        ids: list[str] = row["completion_ids"]
        soft = [[ids.index(first), ids.index(second), chance] for first, second, chance in row["soft"] or ()]
        return {
            "prompt": prompts[row["prompt_id"]].as_dicts(),
            "responses": [completions[name].text for name in ids],
            "ranking": [[ids.index(name) for name in group] for group in row["groups"]],
            "none_acceptable": row["none_acceptable"],
            "annotator": row["annotator"],
            "kind": row["kind"],
            "rationale": row["rationale"],
            "seconds": row["seconds"],
            "order_shown": [ids.index(name) for name in row["order_shown"]],
            "policies": [completions[name].policy for name in ids],
            "collection": row["collection"],
            "created_at": row["created_at"],
            **({"soft": soft} if soft else {}),
        }

    return write_jsonl(path, map(line, rows))


def write_pairs(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    prompts: Mapping[str, Conversation],
    completions: Mapping[str, Completion],
) -> int:
    """Write one line per decided pair and return how many: `prompt`, `chosen` and `rejected` as lists of messages.

    A ranking of K responses gives up to K (K - 1) / 2 lines with the same `ranking_id`: split and weigh by it, not by
    line. Ties decide nothing.
    """

    def lines() -> Iterator[dict[str, Any]]:
        for row in rows:
            prompt = prompts[row["prompt_id"]].as_dicts()
            for better, worse in itertools.combinations(row["groups"], 2):
                for chosen, rejected in itertools.product(better, worse):
                    yield {
                        "prompt": prompt,
                        "chosen": [{"role": "assistant", "content": completions[chosen].text}],
                        "rejected": [{"role": "assistant", "content": completions[rejected].text}],
                        "annotator": row["annotator"],
                        "kind": row["kind"],
                        "ranking_id": row["ranking_id"],
                    }

    return write_jsonl(path, lines())


def write_unpaired(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    prompts: Mapping[str, Conversation],
    completions: Mapping[str, Completion],
) -> int:
    """Write one line per response that is clearly good or bad and return how many: `prompt`, `completion`, `label`.

    The best group is good and the last bad, what stands between is neither; where none was acceptable all are bad. A
    ranking that is one tie says nothing.
    """

    def lines() -> Iterator[dict[str, Any]]:
        for row in rows:
            groups = row["groups"]
            bad = row["completion_ids"] if row["none_acceptable"] else groups[-1] if len(groups) > 1 else []
            good = [] if row["none_acceptable"] or len(groups) < 2 else groups[0]
            for name in row["completion_ids"]:
                if name in good or name in bad:
                    yield {
                        "prompt": prompts[row["prompt_id"]].as_dicts(),
                        "completion": [{"role": "assistant", "content": completions[name].text}],
                        "label": name in good,
                        "annotator": row["annotator"],
                        "kind": row["kind"],
                    }

    return write_jsonl(path, lines())


WRITERS = {"rankings": write, "pairs": write_pairs, "unpaired": write_unpaired}
"""The schemas by name."""
