"""From judgements in the database to the groups of token ids that reward models and DPO train on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from trivium.config import UserError
from trivium.data.chat import render_prompt
from trivium.data.collate import PreferenceGroup
from trivium.data.tokenizer import Tokenizer
from trivium.preferences.comparisons import ranked_groups, split_by_prompt
from trivium.preferences.store import Store
from trivium.records import AnnotatorKind, Completion, Ranking


@dataclass(frozen=True, kw_only=True)
class Judgements:
    """Ranked groups split **by prompt**: no prompt stands on both sides."""

    train: tuple[PreferenceGroup, ...]
    heldout: tuple[PreferenceGroup, ...]
    heldout_rankings: tuple[Ranking, ...]
    kinds: tuple[AnnotatorKind, ...]
    dropped: int
    """Groups left out: no strict preference in them, or longer than the context."""


def load_judgements(
    store: Store,
    collection: str,
    tokenizer: Tokenizer,
    *,
    kinds: Sequence[AnnotatorKind],
    heldout_frac: float,
    context: int,
    seed: int,
) -> Judgements:
    """Return the judgements of a collection as token groups.

    Raises UserError when there is none of the wanted kinds, or when one side of the split is empty.
    """
    rankings = store.rankings(collection, kinds=tuple(kinds) or None)
    if not rankings:
        wanted = " or ".join(kinds) or "any kind"
        raise UserError(f"no rankings ({wanted}) of {collection} in {store.name}; give some with `trivium rank` first")
    sides = split_by_prompt(rankings, fraction=heldout_frac, seed=seed)
    prompts = store.prompts({ranking.prompt_id for ranking in rankings})
    completions = store.completions({c for ranking in rankings for group in ranking.groups for c in group})
    encoded = {identity: render_prompt(tokenizer, prompt) for identity, prompt in prompts.items()}
    tokens = {identity: completion_ids(completion, tokenizer) for identity, completion in completions.items()}
    kept: list[list[PreferenceGroup]] = []
    for side, name in zip(sides, ("training", "held-out"), strict=True):
        groups = [
            PreferenceGroup(
                prompt_ids=encoded[group.prompt_id],
                completion_ids=[tokens[identity] for identity in group.completion_ids],
                ranks=list(group.ranks),
                ref_logprobs=None,
            )
            for group in ranked_groups(side)
        ]
        short = [g for g in groups if len(g.prompt_ids) + max(map(len, g.completion_ids)) <= context]
        if not short:
            raise UserError(
                f"{collection}: {len(rankings)} rankings leave none for the {name} side, without ties and within "
                f"context = {context} tokens; collect more, or change heldout_frac or context"
            )
        kept.append(short)
    return Judgements(
        train=tuple(kept[0]),
        heldout=tuple(kept[1]),
        heldout_rankings=tuple(sides[1]),
        kinds=tuple(sorted({ranking.kind for ranking in rankings})),
        dropped=len(rankings) - len(kept[0]) - len(kept[1]),
    )


def completion_ids(completion: Completion, tokenizer: Tokenizer) -> list[int]:
    """Return the ids as they were sampled; a text from elsewhere is encoded and closed with the end of turn.

    Ids that do not spell the text are another tokenizer's, and as good as from elsewhere.
    """
    ids = list(completion.token_ids)
    if ids and max(ids) < tokenizer.vocab_size and tokenizer.decode(ids) == completion.text:
        return ids
    return [*tokenizer.encode(completion.text), tokenizer.end_id]


def num_pairs(groups: Sequence[PreferenceGroup]) -> int:
    """Return how many pairs the groups decide."""
    return sum(a != b for group in groups for a, b in itertools.combinations(group.ranks, 2))


def data_facts(name: str, groups: Sequence[PreferenceGroup]) -> dict[str, object]:
    """Return what a manifest says about judgements as training data."""
    tokens = sum(len(g.prompt_ids) + len(c) for g in groups for c in g.completion_ids)
    return {"name": name, "num_rankings": len(groups), "num_pairs": num_pairs(groups), "tokens": tokens}
