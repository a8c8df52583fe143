"""From judgements in the database to the groups of token ids that reward models and DPO train on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from trivium.config import UserError
from trivium.data.chat import render_prompt
from trivium.data.collate import PreferenceGroup
from trivium.data.tokenizer import Tokenizer
from trivium.preferences.store import Store
from trivium.records import Completion, Ranking


@dataclass(frozen=True, kw_only=True)
class Judgements:
    """Ranked groups split **by prompt**: no prompt stands on both sides."""

    train: tuple[PreferenceGroup, ...]
    heldout: tuple[PreferenceGroup, ...]
    train_rankings: tuple[Ranking, ...]
    heldout_rankings: tuple[Ranking, ...]
    dropped: int
    """Groups left out: no strict preference in them, or longer than the context."""


def load_judgements(
    store: Store, collection: str, tokenizer: Tokenizer, *, kinds: Sequence[str], heldout_frac: float, context: int
) -> Judgements:
    """Return the judgements of a collection as token groups.

    Raises UserError when there is none of the wanted kinds, or when one side of the split is empty.
    """
    rankings = store.rankings(collection, kinds=tuple(kinds) or None)
    if not rankings:
        wanted = " or ".join(kinds) or "any kind"
        raise UserError(f"no rankings ({wanted}) for {collection} in {store.url}; rank some with `trivium rank` first")
    sides: tuple[list[tuple[PreferenceGroup, Ranking]], ...] = ([], [])
    dropped = 0
    for ranking in rankings:
        group = _group(store, ranking, tokenizer)
        longest = len(group.prompt_ids) + max((len(c) for c in group.completion_ids), default=0)
        if len(set(group.ranks)) < 2 or longest > context:
            dropped += 1
            continue
        sides[_is_heldout(ranking.prompt_id, heldout_frac)].append((group, ranking))
    for side, name in zip(sides, ("training", "held-out"), strict=True):
        if not side:
            raise UserError(
                f"{collection}: {len(rankings)} rankings leave none for the {name} side "
                f"({dropped} without a preference or too long); collect more or change heldout_frac"
            )
    return Judgements(
        train=tuple(g for g, _ in sides[0]),
        heldout=tuple(g for g, _ in sides[1]),
        train_rankings=tuple(r for _, r in sides[0]),
        heldout_rankings=tuple(r for _, r in sides[1]),
        dropped=dropped,
    )


def completion_ids(completion: Completion, tokenizer: Tokenizer) -> list[int]:
    """Return the ids as they were sampled; a text from elsewhere is encoded and closed with the end of turn."""
    if completion.token_ids:
        return list(completion.token_ids)
    return [*tokenizer.encode(completion.text), tokenizer.end_id]


def _group(store: Store, ranking: Ranking, tokenizer: Tokenizer) -> PreferenceGroup:
    ordered = [(identity, rank) for rank, group in enumerate(ranking.groups) for identity in group]
    return PreferenceGroup(
        prompt_ids=render_prompt(tokenizer, store.prompt(ranking.prompt_id)),
        completion_ids=[completion_ids(store.completion(identity), tokenizer) for identity, _ in ordered],
        ranks=[rank for _, rank in ordered],
        ref_logprobs=None,
    )


def _is_heldout(prompt_id: str, heldout_frac: float) -> bool:
    """Tell the side of a prompt from a hash of it, so that more judgements never move a prompt across."""
    digest = hashlib.sha256(f"heldout {prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < heldout_frac * 2**64
