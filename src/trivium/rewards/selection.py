"""Which of several completions of one prompt are worth learning, by their rewards."""

from __future__ import annotations

import torch
from torch import Tensor


def picked_rows(scores: Tensor, group: int, num: int, floor: float | None) -> list[int]:
    """Return the rows of the `num` best of each group of `group` neighbours, best first, without those below `floor`.

    Of equal scores the one sampled first is taken. Worked: scores 1 3 2 and 5 4 6, groups of 3: the best are rows 1 and
    5, the best two of each 1 2 5 3, and of those, with a floor of 2.5, 1 5 3.
    """
    order = scores.view(-1, group).argsort(dim=1, descending=True, stable=True)[:, :num]
    rows = (order + torch.arange(len(order)).unsqueeze(1) * group).flatten()
    return [row for row in rows.tolist() if floor is None or float(scores[row]) >= floor]
