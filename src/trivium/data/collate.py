"""Rows of tokens become padded batches; the one place where targets are shifted and where rows are cut.

Rows are padded on the right: a causal model cannot see what comes later, so a pad changes nothing before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trivium.batches import IGNORE, PreferenceBatch, TokenBatch
from trivium.config import UserError

Row = tuple[Sequence[int], Sequence[bool]]
"""Ids, and for each whether it is to be predicted."""


def fit_row(input_ids: Sequence[int], trained: Sequence[bool], context: int) -> Row | None:
    """Return the row cut on the right to `context` tokens, or None when nothing trained would be left.

    A conversation cut so loses the end of a turn, never gains a false one. Rows of None are dropped by the caller,
    who counts them: a row without targets would only dilute the batch.
    """
    ids, mask = input_ids[:context], trained[:context]
    return (ids, mask) if any(mask[1:]) else None


def pad_rows(rows: Sequence[Row], pad_id: int, weights: Sequence[Sequence[float]] | None = None) -> TokenBatch:
    """Return rows as a TokenBatch [B, longest row]; `targets[t]` is token t+1 where that one is trained, else IGNORE.

    ::

        ids      <user> hi <end> <assistant> yo <end>      trained  0 0 0 0 1 1
        targets  -100 -100 -100  yo          <end> -100

    `weights`: what each token of each row counts for where it is trained; None leaves the batch without weights.
    Raises ValueError when a row's ids and mask differ in length, or when there is no row.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    width = max(len(ids) for ids, _ in rows)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    targets = np.full((len(rows), width), IGNORE, dtype=np.int64)
    for index, (ids, trained) in enumerate(rows):
        if len(ids) != len(trained):
            raise ValueError(f"row {index} has {len(ids)} ids and a mask of {len(trained)}")
        values, mask = np.asarray(ids, dtype=np.int64), np.asarray(trained, dtype=bool)
        input_ids[index, : len(ids)] = values
        targets[index, : max(len(ids) - 1, 0)] = np.where(mask[1:], values[1:], IGNORE)
    shifted, positions = torch.from_numpy(targets), torch.arange(width).repeat(len(rows), 1)
    counts = None
    if weights is not None:
        counts = torch.zeros(len(rows), width)
        for index, each in enumerate(weights):
            counts[index, : len(each) - 1] = torch.tensor(each[1:], dtype=torch.float32)
        counts = counts.masked_fill(shifted == IGNORE, 0.0)
    return TokenBatch(input_ids=torch.from_numpy(input_ids), targets=shifted, positions=positions, weights=counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceGroup:
    """One prompt and its judged completions (ids as sampled, the end of turn included).

    `ranks[k]` places completion k, smaller is better and equal is a tie; any integers will do. `ref_logprobs[k]` is the
    reference's summed log-probability of completion k in nats, where known. `weight` is what the ranking counts for,
    `prompt_id` the prompt's identity even where `prompt_ids` were cut. `soft` holds (i, j, probability that i is the
    better completion); where there are some, they are the group's pairs, and the ranks make none.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[Sequence[int]]
    ranks: Sequence[int]
    ref_logprobs: Sequence[float] | None = None
    weight: float = 1.0
    prompt_id: str = ""
    soft: Sequence[tuple[int, int, float]] = ()


def collate_preferences(groups: Sequence[PreferenceGroup], pad_id: int, *, ties: bool = False) -> PreferenceBatch:
    """Return the batch of all completions, each row once, with every strict pair among those of a prompt.

    The pairs of a ranking share its weight, by default 1: with ranks (0, 1, 1) there are two strict pairs of weight 1/2
    and no pair for the tie. A prompt whose completions all tie has rows but no pairs. With `ties` a tied pair is there
    as half a win each way: the same ranks give three pairs of 1/3, the tied one as two of 1/6. A group with soft labels
    has them as its pairs, the likelier one as chosen, with its probability among `targets`. Reference
    log-probabilities are given for all groups or taken as absent. Raises ValueError when a group's lists differ in
    length.
    """
    rows: list[Row] = []
    ranks: list[int] = []
    owners: list[int] = []
    pairs: list[tuple[int, int]] = []
    weights: list[float] = []
    targets: list[float] = []
    for owner, group in enumerate(groups):
        if len(group.completion_ids) != len(group.ranks) or len(group.ref_logprobs or group.ranks) != len(group.ranks):
            raise ValueError(f"group {owner}: completions, ranks and ref_logprobs differ in length")
        first = len(rows)
        order = {rank: place for place, rank in enumerate(sorted(set(group.ranks)))}
        for completion, rank in zip(group.completion_ids, group.ranks, strict=True):
            mask = [False] * len(group.prompt_ids) + [True] * len(completion)
            rows.append(([*group.prompt_ids, *completion], mask))
            ranks.append(order[rank])
            owners.append(owner)
        strict = [(a, b) for a, b in itertools.permutations(range(first, len(rows)), 2) if ranks[a] < ranks[b]]
        tied = [(a, b) for a, b in itertools.permutations(range(first, len(rows)), 2) if ties and ranks[a] == ranks[b]]
        chances = [1.0] * (len(strict) + len(tied))
        if group.soft:
            strict = [(first + i, first + j) if p >= 0.5 else (first + j, first + i) for i, j, p in group.soft]
            tied, chances = [], [max(p, 1.0 - p) for _, _, p in group.soft]
        share = group.weight / max(len(strict) + len(tied) / 2, 1)
        pairs += strict + tied
        weights += [share] * len(strict) + [share / 2] * len(tied)
        targets += chances
    known = all(group.ref_logprobs is not None for group in groups)
    reference = [value for group in groups for value in group.ref_logprobs or ()] if known else None
    return PreferenceBatch(
        tokens=pad_rows(rows, pad_id),
        lengths=torch.tensor([len(ids) for ids, _ in rows]),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        weights=torch.tensor(weights, dtype=torch.float32),
        ranks=torch.tensor(ranks),
        groups=torch.tensor(owners),
        ref_logprobs=None if reference is None else torch.tensor(reference, dtype=torch.float32),
        ranking_weights=torch.tensor([group.weight for group in groups], dtype=torch.float32),
        targets=torch.tensor(targets, dtype=torch.float32) if any(group.soft for group in groups) else None,
    )


def mismatched(
    groups: Sequence[PreferenceGroup], donors: Sequence[PreferenceGroup], context: int
) -> list[PreferenceGroup]:
    """Return each group's prompt with completions of the next of `donors` that has another prompt, none of them ranked.

    KTO's reference point is measured on them. They are the ones that it judges, of the best and the worst place, cut
    so that a row has at most `context` tokens. Raises UserError when all donors have the group's prompt.

    Worked: groups x: (a, b), y: (c, d), z: (e, f) give x: (c, d), y: (e, f), z: (a, b).
    """
    found = []
    for place, group in enumerate(groups):
        order = (donors[ahead % len(donors)] for ahead in range(place + 1, place + 1 + len(donors)))
        own = list(group.prompt_ids)
        donor = next((other for other in order if list(other.prompt_ids) != own), None)
        if donor is None:
            raise UserError("loss = 'kto' needs rankings of at least two prompts; collect more, or take loss = 'dpo'")
        ends = {min(donor.ranks), max(donor.ranks)}
        judged = [ids for ids, rank in zip(donor.completion_ids, donor.ranks, strict=True) if rank in ends]
        rows = [list(ids)[: context - len(group.prompt_ids)] for ids in judged]
        found.append(PreferenceGroup(prompt_ids=group.prompt_ids, completion_ids=rows, ranks=[0] * len(rows)))
    return found
