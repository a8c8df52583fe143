"""Losses of a reward model: judgements of completions become scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: float | Tensor = 0.0, target: Tensor | None = None
) -> Tensor:
    """Return `-log sigmoid(chosen - rejected - margin)` of each pair, fp32 [P].

    `chosen`, `rejected`: scores [P]. The negative log-likelihood that the chosen one wins (Bradley and Terry 1952;
    InstructGPT eq. 1). A positive `margin` (Llama 2, eq. 2; a number or [P]) asks for a lead of that many nats.
    Scores are free up to a constant per prompt.

    `target` [P], where given, is the probability p that the chosen one is the better one, and the loss is the
    cross-entropy `-p log sigmoid(lead) - (1 - p) log sigmoid(-lead)` with it (Bai et al. 2022, Constitutional AI,
    section 4.1): least at a lead of log(p / (1 - p)), and equal to the above at p = 1, bit for bit.

    Worked: leads 0, 1, 2 give 0.6931, 0.3133, 0.1269; a lead of 1 with p = 3/4 gives 0.3133 + 1/4 = 0.5633.
    """
    behind = margin - (chosen.float() - rejected.float())
    loss = softplus(behind)
    return loss if target is None else loss - (1.0 - target) * behind


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return `(chosen + rejected)^2` of each pair, fp32 [P]: a price on scores that drift away from zero together.

    A ranking loss knows leads only, so nothing else holds the scores in place (Eisenstein et al. 2023, arXiv
    2312.09244, section 2). Worked: scores 2 and 1 cost 9, scores 1/2 and -1/2 nothing.
    """
    return (chosen.float() + rejected.float()).square()


def plackett_luce(scores: Tensor, ranks: Tensor, groups: Tensor) -> Tensor:
    """Return the negative log-likelihood of each group's ranking, fp32 [G], in the order of sorted group ids.

    `scores` [N]; `ranks` int64 [N], 0 = best, equal = tie; `groups` int64 [N], which rows were ranked together.
    `nll = sum_i (logsumexp_{j not better than i} s_j - s_i)`: the best is chosen among all, the next among the rest,
    and so on. Two items give exactly `bradley_terry`.

    Ties: each tied item is chosen from all items that are not strictly better, its tie mates included (Breslow's
    approximation). So a tie pulls its items' scores together, and a group that is one tie is least at equal scores.

    Worked: scores ln 3, ln 2, ln 1 ranked in that order have likelihood 3/6 * 2/3 * 1 = 1/3, so the loss is ln 3.
    """
    scores = scores.float()
    # Row i, column j: j was still there to be chosen when i was.
    rivals = (groups[:, None] == groups[None, :]) & (ranks[None, :] >= ranks[:, None])
    normalisers = torch.where(rivals, scores[None, :], -torch.inf).logsumexp(-1)
    ids, index = torch.unique(groups, return_inverse=True)
    return torch.zeros(len(ids), device=scores.device).index_add(0, index, normalisers - scores)
