"""What follows from rankings: pairs, ranked groups for training, and a split in which no prompt is on both sides."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trivium.records import Comparison, Completion, Conversation, Ranking, content_id


def derive(ranking: Ranking) -> list[tuple[str, str]]:
    """Return (chosen, rejected) completion ids for every pair that the ranking decides; ties decide nothing.

    [[a], [b, c]] gives (a, b), (a, c). A ranking "none acceptable" without an order gives no pair.
    """
    return [
        (chosen, rejected)
        for better, worse in itertools.combinations(ranking.groups, 2)
        for chosen in better
        for rejected in worse
    ]


def comparisons(
    rankings: Iterable[Ranking],
    prompts: Mapping[str, Conversation],
    completions: Mapping[str, Completion],
) -> Iterator[Comparison]:
    """Yield every decided pair with its texts, for exporters and specimens."""
    for ranking in rankings:
        for chosen, rejected in derive(ranking):
            yield Comparison(
                prompt=prompts[ranking.prompt_id],
                chosen=completions[chosen],
                rejected=completions[rejected],
                ranking_id=ranking.id,
            )


def majority(rankings: Sequence[Ranking], *, annotator: str = "majority") -> list[Ranking]:
    """Return one ranking for each set of responses that was judged: responses by the majorities they win (Copeland).

    Each pair goes to the response that more annotators placed higher; a response has a point for each pair it wins and
    half a point for each that is even. Equal points share a group. Worked: a > b > c, a > c > b and b > a > c give a
    two points, b one and c none. There is no `order_shown`: nobody was shown this.
    """
    found: dict[tuple[str, ...], list[Ranking]] = {}
    for ranking in rankings:
        names = sorted(name for group in ranking.groups for name in group)
        if len(names) >= 2:
            found.setdefault((ranking.prompt_id, *names), []).append(ranking)
    made = []
    for (prompt, *names), votes in found.items():
        lead = dict.fromkeys(itertools.permutations(names, 2), 0)
        for vote in votes:
            for chosen, rejected in derive(vote):
                lead[chosen, rejected] += 1
                lead[rejected, chosen] -= 1
        points = {a: sum((lead[a, b] > 0) + 0.5 * (lead[a, b] == 0) for b in names if b != a) for a in names}
        levels = sorted(set(points.values()), reverse=True)
        groups = tuple(tuple(name for name in names if points[name] == level) for level in levels)
        made.append(Ranking(prompt_id=prompt, groups=groups, annotator=annotator, kind=votes[0].kind))
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedGroup:
    """One annotator's ranking as training wants it: ids and, parallel to them, ranks (0 is best, ties share one).

    `soft` holds (i, j, probability that completion i is better than j), i and j as places in `completion_ids`.
    """

    prompt_id: str
    completion_ids: tuple[str, ...]
    ranks: tuple[int, ...]
    annotator: str
    kind: str
    soft: tuple[tuple[int, int, float], ...] = ()

    @property
    def num_pairs(self) -> int:
        """The number of decided pairs; a loss over all of them weighs each by 1 / num_pairs (InstructGPT 3.5)."""
        return sum(a != b for a, b in itertools.combinations(self.ranks, 2))


def ranked_groups(rankings: Iterable[Ranking], *, ties: bool = False, soft: bool = False) -> list[RankedGroup]:
    """Return one group per ranking that decides at least one pair, in the order given.

    With `ties` also those that are one single tie, which says that all are equally good (unless none was acceptable:
    then nobody compared them). With `soft` the groups carry the soft labels, and those are kept that have nothing else.
    All pairs of a ranking stay together: shuffled apart, they overfit within one epoch (InstructGPT 3.5).
    """
    groups = []
    for ranking in rankings:
        tie = ties and not ranking.none_acceptable and len(ranking.groups) == 1 and len(ranking.groups[0]) > 1
        labels = ranking.soft if soft else ()
        if len(ranking.groups) < 2 and not tie and not labels:
            continue
        # A tie stays in the order it was given in: sorted by id, sums would round by the name of the policy's run.
        placed = [(name, rank) for rank, group in enumerate(ranking.groups) for name in group]
        place = {name: number for number, (name, _) in enumerate(placed)}
        groups.append(
            RankedGroup(
                prompt_id=ranking.prompt_id,
                completion_ids=tuple(name for name, _ in placed),
                ranks=tuple(rank for _, rank in placed),
                annotator=ranking.annotator,
                kind=ranking.kind,
                soft=tuple((place[first], place[second], chance) for first, second, chance in labels),
            )
        )
    return groups


def heldout_prompts(prompt_ids: Iterable[str], fraction: float, seed: int) -> frozenset[str]:
    """Return the prompts to be held out: round(fraction * prompts) of them, and at least one on each side if two exist.

    Chosen by hash, so that neither order nor repetition matters and new prompts hardly move old ones.
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    ids = sorted(set(prompt_ids), key=lambda name: content_id("heldout", seed, name))
    wanted = round(fraction * len(ids))
    if fraction > 0 and len(ids) >= 2:
        wanted = min(max(wanted, 1), len(ids) - 1)
    return frozenset(ids[:wanted])


def split_by_prompt(
    rankings: Sequence[Ranking], *, fraction: float = 0.1, seed: int = 0
) -> tuple[list[Ranking], list[Ranking]]:
    """Return (training, held-out) rankings; all judgements of a prompt are on the same side."""
    heldout = heldout_prompts((ranking.prompt_id for ranking in rankings), fraction, seed)
    return (
        [ranking for ranking in rankings if ranking.prompt_id not in heldout],
        [ranking for ranking in rankings if ranking.prompt_id in heldout],
    )


def with_a_choice(
    prompts: Sequence[Conversation], completions: Sequence[Completion], group: int
) -> list[tuple[Conversation, list[Completion]]]:
    """Return each prompt of `group` neighbours with its distinct texts.

    One whose completions are all a single text, or empty, leaves nothing to choose and is left out.
    """
    found = []
    for start in range(0, len(prompts), group):
        distinct = {c.text: c for c in completions[start : start + group] if c.text.strip()}
        if len(distinct) > 1:
            found.append((prompts[start], list(distinct.values())))
    return found


def wins_by_prompt(
    rankings: Iterable[Ranking], policy_of: Mapping[str, str], ours: str, theirs: str
) -> tuple[list[float], list[float]]:
    """Return, prompt by prompt, the points of our policy's completions against theirs (a tie is half) and the pairs.

    Sums of the first over sums of the second are the win rate; whole prompts are what an interval resamples.
    """
    points: dict[str, float] = {}
    pairs: dict[str, float] = {}
    for ranking in rankings:
        place = {name: rank for rank, group in enumerate(ranking.groups) for name in group}
        mine = [rank for name, rank in place.items() if policy_of[name] == ours]
        others = [rank for name, rank in place.items() if policy_of[name] == theirs]
        won = sum(1.0 if a < b else 0.5 if a == b else 0.0 for a, b in itertools.product(mine, others))
        points[ranking.prompt_id] = points.get(ranking.prompt_id, 0.0) + won
        pairs[ranking.prompt_id] = pairs.get(ranking.prompt_id, 0.0) + len(mine) * len(others)
    compared = [name for name, number in pairs.items() if number]
    return [points[name] for name in compared], [pairs[name] for name in compared]
