"""The way out: rankings as JSON Lines in the field's schema, and as one digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
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
