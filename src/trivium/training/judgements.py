"""From judgements in the database to the groups of token ids that reward models and DPO train on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trivium.config import UserError, suggest
from trivium.data.chat import render_prompt
from trivium.data.collate import PreferenceGroup
from trivium.data.tokenizer import Tokenizer
from trivium.preferences.comparisons import ranked_groups, split_by_prompt
from trivium.preferences.reliability import Reliability, reliability
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
    """Groups left out: no strict preference in them, longer than the context, or of weight 0."""
    cut: int = 0
    """Groups whose prompt was cut at its beginning to fit into the context."""
    reliability: Mapping[str, Reliability] = field(default_factory=dict)
    """What was measured of each annotator on the training side, where weights by reliability were asked for."""


def load_judgements(
    store: Store,
    collection: str,
    tokenizer: Tokenizer,
    *,
    kinds: Sequence[AnnotatorKind],
    heldout_frac: float,
    context: int,
    seed: int,
    ties: bool = False,
    weights: Mapping[str, float] | None = None,
    cut: bool = False,
    by_reliability: bool = False,
    soft: bool = False,
) -> Judgements:
    """Return the judgements of a collection as token groups.

    With `ties`, rankings that are one tie are trained on too. `weights`: what an annotator's rankings count for in
    training, 1 where not named. `cut`: cut prompts that are too long instead of leaving their groups out.
    `by_reliability` multiplies the weights by those of `preferences.reliability`, measured on the training side alone.
    `soft`: train on how sure a judge was, where it said so (an order in both ways of asking is what is held out).
    Raises UserError where a side of the split is empty, none is of the wanted kinds, or an annotator is unknown.
    """
    rankings = rankings_of(store, collection, kinds, weights := weights or {})
    sides = split_by_prompt(rankings, fraction=heldout_frac, seed=seed)
    measured = measured_on(sides[0], collection) if by_reliability else {}
    encoded, tokens = encoded_texts(store, rankings, tokenizer)
    kept: list[list[PreferenceGroup]] = []
    num_cut = 0
    for side, name, training in zip(sides, ("training", "held-out"), (True, False), strict=True):
        groups = [
            PreferenceGroup(
                prompt_ids=encoded[group.prompt_id],
                completion_ids=[tokens[identity] for identity in group.completion_ids],
                ranks=list(group.ranks),
                ref_logprobs=None,
                weight=weight_of(group.annotator, weights, measured) if training else 1.0,
                prompt_id=group.prompt_id,
                soft=group.soft,
            )
            for group in ranked_groups(side, ties=ties and training, soft=soft and training)
        ]
        fitting = [cut_prompt(g, context) if cut else g for g in groups if g.weight > 0]
        num_cut += sum(len(g.prompt_ids) < len(encoded[g.prompt_id]) for g in fitting)
        short = [g for g in fitting if length_of(g) <= context]
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
        cut=num_cut,
        reliability=measured,
    )


def encoded_texts(
    store: Store, rankings: Sequence[Ranking], tokenizer: Tokenizer
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return the token ids of the prompts and of the completions that the rankings name, by id."""
    prompts = store.prompts({ranking.prompt_id for ranking in rankings})
    completions = store.completions({c for ranking in rankings for group in ranking.groups for c in group})
    return (
        {identity: render_prompt(tokenizer, prompt) for identity, prompt in prompts.items()},
        {identity: completion_ids(completion, tokenizer) for identity, completion in completions.items()},
    )


def measured_on(rankings: Sequence[Ranking], collection: str) -> dict[str, Reliability]:
    """Return the annotators' reliability; raises UserError where nobody judged what others did."""
    found = reliability(rankings)
    if not any(one.pairs for one in found.values()):
        raise UserError(
            f"{collection}: no two annotators judged the same responses, so nobody's reliability can be measured; "
            "collect with overlap = 3, or set annotator_weights = 'named'"
        )
    return found


def weight_of(annotator: str, weights: Mapping[str, float], measured: Mapping[str, Reliability]) -> float:
    """Return what an annotator's rankings count for: the weight given by name times the one that was measured."""
    weight = weights.get(annotator, 1.0)
    return weight * measured[annotator].weight if annotator in measured else weight


def rankings_of(
    store: Store, collection: str, kinds: Sequence[AnnotatorKind], weights: Mapping[str, float]
) -> list[Ranking]:
    """Return a collection's rankings; raises UserError for none, or a weight of somebody who ranked nothing."""
    rankings = store.rankings(collection, kinds=tuple(kinds) or None)
    if not rankings:
        wanted = " or ".join(kinds) or "any kind"
        raise UserError(f"no rankings ({wanted}) of {collection} in {store.name}; give some with `trivium rank` first")
    known = {ranking.annotator for ranking in rankings}
    for name in sorted(set(weights) - known):
        raise UserError(f"weights names {name!r}, who ranked nothing in {collection}{suggest(name, known)}")
    return rankings


def length_of(group: PreferenceGroup) -> int:
    """Return the tokens of the group's longest row."""
    return len(group.prompt_ids) + max(map(len, group.completion_ids))


def cut_prompt(group: PreferenceGroup, context: int) -> PreferenceGroup:
    """Return the group with its prompt cut so that the longest row has `context` tokens.

    The first token stays (it begins every text), then comes the prompt's end: what the responses answer. As it was
    where it fits already, or where no cut would help. Worked: a prompt of 5 with a completion of 3 in a context of 6
    keeps tokens 0, 3 and 4.
    """
    room = context - max(map(len, group.completion_ids))
    if len(group.prompt_ids) <= room or room < 2:
        return group
    return dataclasses.replace(group, prompt_ids=[group.prompt_ids[0], *group.prompt_ids[-(room - 1) :]])


def part_of(groups: Sequence[PreferenceGroup], num: int, seed: int) -> tuple[PreferenceGroup, ...]:
    """Return `num` of the groups, or all for 0: a random part in the order given, each part within every larger one."""
    if not num or num >= len(groups):
        return tuple(groups)
    order = np.random.default_rng([seed, 0x9A]).permutation(len(groups))
    return tuple(groups[index] for index in sorted(order[:num].tolist()))


def resampled(groups: Sequence[PreferenceGroup], seed: int, member: int) -> tuple[PreferenceGroup, ...]:
    """Return the groups as they are for member 0; for others each prompt's weights times a draw of the member's own.

    The draws are exponential with mean 1, a bootstrap that leaves no prompt out (Rubin 1981, "The Bayesian bootstrap"),
    and one for all rankings of a prompt, because those are no independent witnesses.
    """
    if not member:
        return tuple(groups)
    names = list(dict.fromkeys(group.prompt_id for group in groups))
    draws = np.random.default_rng([seed, 0xE5, member]).exponential(size=len(names))
    drawn = dict(zip(names, draws.tolist(), strict=True))
    return tuple(dataclasses.replace(group, weight=group.weight * drawn[group.prompt_id]) for group in groups)


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
    soft = sum(len(group.soft) for group in groups)
    facts = {"name": name, "num_rankings": len(groups), "num_pairs": num_pairs(groups), "tokens": tokens}
    return facts | ({"num_soft": soft} if soft else {})
