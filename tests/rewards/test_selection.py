"""What is picked of a prompt's completions: the best, in order, with a floor."""

import torch

from trivium.rewards.selection import picked_rows

SCORES = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0, 6.0])


def test_the_best_of_each_group_by_hand():
    """1 3 2 and 5 4 6 in groups of three: rows 1 and 5; two of each, best first; a floor leaves out what is below."""
    assert picked_rows(SCORES, 3, 1, None) == [1, 5]
    assert picked_rows(SCORES, 3, 2, None) == [1, 2, 5, 3]
    assert picked_rows(SCORES, 3, 2, 2.5) == [1, 5, 3]
    assert picked_rows(SCORES, 3, 1, 9.0) == []
    assert picked_rows(SCORES, 3, 2, 6.0) == [5]  # a score at the floor stays


def test_of_equal_scores_the_first_sampled_is_taken():
    assert picked_rows(torch.tensor([2.0, 2.0, 1.0, 0.0, 0.0, 0.0]), 3, 2, None) == [0, 1, 3, 4]
