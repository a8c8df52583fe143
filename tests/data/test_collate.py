"""Shifting, padding, cutting and pairing, by hand."""

import pytest
import torch

from trivium.batches import IGNORE
from trivium.config import UserError
from trivium.data.collate import PreferenceGroup, collate_preferences, fit_row, mismatched, pad_rows


def test_the_worked_example_of_the_batches():
    batch = pad_rows([([3, 20, 7, 4, 21, 7], [False, False, False, False, True, True])], pad_id=0)
    assert batch.targets.tolist() == [[IGNORE, IGNORE, IGNORE, 21, 7, IGNORE]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert batch.num_items == 2


def test_rows_are_padded_on_the_right_and_pads_are_no_targets():
    batch = pad_rows([([5, 6], [True, True]), ([7, 8, 9], [True, True, True])], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch.targets.tolist() == [[6, IGNORE, IGNORE], [8, 9, IGNORE]]
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    with pytest.raises(ValueError, match="row 0"):
        pad_rows([([1, 2], [True])], pad_id=0)
    with pytest.raises(ValueError, match="at least one row"):
        pad_rows([], pad_id=0)


def test_cutting_keeps_the_beginning_and_drops_rows_without_targets():
    ids, trained = [1, 2, 3, 4, 5], [False, False, False, True, True]
    assert fit_row(ids, trained, 8) == (ids, trained)
    assert fit_row(ids, trained, 4) == ([1, 2, 3, 4], [False, False, False, True])
    assert fit_row(ids, trained, 3) is None
    assert fit_row([1, 2], [True, False], 8) is None  # the first token has nothing before it to predict it


def test_pairs_of_a_prompt_share_weight_one():
    groups = [
        PreferenceGroup(prompt_ids=[1, 2], completion_ids=[[10, 7], [11, 7], [12, 13, 7]], ranks=[3, 1, 3]),
        PreferenceGroup(prompt_ids=[1], completion_ids=[[14], [15]], ranks=[5, 5]),
        PreferenceGroup(prompt_ids=[1], completion_ids=[[16], [17]], ranks=[1, 2]),
    ]
    batch = collate_preferences(groups, pad_id=0)
    assert batch.pairs.tolist() == [[1, 0], [1, 2], [5, 6]]
    assert batch.weights.tolist() == [0.5, 0.5, 1.0]
    assert batch.ranks.tolist() == [1, 0, 1, 0, 0, 0, 1]
    assert batch.groups.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert batch.lengths.tolist() == [4, 4, 5, 2, 2, 2, 2]
    assert batch.num_items == 2
    assert batch.tokens.targets[0].tolist() == [IGNORE, 10, 7, IGNORE, IGNORE]
    assert batch.ref_logprobs is None


def test_five_ranked_responses_give_ten_pairs_of_a_tenth():
    group = PreferenceGroup(prompt_ids=[1], completion_ids=[[i] for i in range(2, 7)], ranks=[4, 2, 0, 1, 3])
    batch = collate_preferences([group], pad_id=0)
    assert len(batch.pairs) == 10
    assert torch.allclose(batch.weights, torch.full((10,), 0.1))
    assert all(batch.ranks[a] < batch.ranks[b] for a, b in batch.pairs.tolist())


def test_reference_logprobs_follow_their_rows_and_only_ties_give_no_pairs():
    group = PreferenceGroup(prompt_ids=[1], completion_ids=[[2], [3]], ranks=[0, 0], ref_logprobs=[-1.5, -2.5])
    batch = collate_preferences([group], pad_id=0)
    assert batch.ref_logprobs.tolist() == [-1.5, -2.5]
    assert batch.pairs.shape == (0, 2) and batch.num_items == 0
    with pytest.raises(ValueError, match="group 0"):
        collate_preferences([PreferenceGroup(prompt_ids=[1], completion_ids=[[2]], ranks=[0, 1])], pad_id=0)


def test_a_tie_is_half_a_win_each_way_where_ties_are_asked_for():
    """Ranks 0, 1, 1: three pairs share weight 1, so each strict one is a third and the tie two of a sixth."""
    groups = [
        PreferenceGroup(prompt_ids=[1], completion_ids=[[2], [3], [4]], ranks=[0, 1, 1]),
        PreferenceGroup(prompt_ids=[1], completion_ids=[[5], [6]], ranks=[0, 0]),
    ]
    batch = collate_preferences(groups, pad_id=0, ties=True)
    assert batch.pairs.tolist() == [[0, 1], [0, 2], [1, 2], [2, 1], [3, 4], [4, 3]]
    assert batch.weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 6, 1 / 6, 1 / 2, 1 / 2])
    assert float(batch.num_items) == pytest.approx(2)


def test_a_ranking_counts_for_its_weight():
    groups = [
        PreferenceGroup(prompt_ids=[1], completion_ids=[[2], [3], [4]], ranks=[0, 1, 1], weight=3.0),
        PreferenceGroup(prompt_ids=[1], completion_ids=[[5], [6]], ranks=[0, 1]),
    ]
    batch = collate_preferences(groups, pad_id=0)
    assert batch.weights.tolist() == [1.5, 1.5, 1.0]
    assert batch.ranking_weights.tolist() == [3, 1]
    assert batch.num_items == 4


def ranked(prompt: list[int], *completions: list[int], ranks: list[int] | None = None) -> PreferenceGroup:
    order = list(range(len(completions))) if ranks is None else ranks
    return PreferenceGroup(prompt_ids=prompt, completion_ids=completions, ranks=order, ref_logprobs=[0.0] * len(order))


def test_each_prompt_gets_the_completions_of_the_next_that_is_another():
    """The worked example; a prompt ranked twice is not its own stranger; only best and worst go along."""
    groups = [
        ranked([1], [10], [11]),
        ranked([1], [12], [13], [14]),
        ranked([2, 3], [15], [16], [17], [18], ranks=[1, 0, 1, 2]),
    ]
    found = mismatched(groups, groups, 9)
    assert [g.prompt_ids for g in found] == [[1], [1], [2, 3]]
    assert [g.completion_ids for g in found] == [[[16], [18]], [[16], [18]], [[10], [11]]]
    assert all(len(set(g.ranks)) == 1 and g.ref_logprobs is None for g in found)
    assert len(collate_preferences(found, 0).pairs) == 0


def test_strangers_are_cut_to_the_context_and_come_from_the_donors():
    held_out, train = [ranked([5] * 6, [1])], [ranked([7], [21, 22, 23, 24], [25])]
    assert mismatched(held_out, train, 8)[0].completion_ids == [[21, 22], [25]]
    with pytest.raises(UserError, match="two prompts"):
        mismatched(train, train, 8)


def test_soft_labels_are_the_pairs_of_their_group():
    """The likelier one is chosen, whatever the ranks say; a group without labels has the target 1."""
    soft = PreferenceGroup(
        prompt_ids=[1],
        completion_ids=[[2], [3], [4]],
        ranks=[0, 0, 1],
        soft=[(0, 1, 0.3), (0, 2, 0.5), (1, 2, 0.9)],
    )
    hard = PreferenceGroup(prompt_ids=[1], completion_ids=[[5], [6]], ranks=[1, 0])
    batch = collate_preferences([soft, hard], pad_id=0, ties=True)
    assert batch.pairs.tolist() == [[1, 0], [0, 2], [1, 2], [4, 3]]
    assert batch.targets.tolist() == pytest.approx([0.7, 0.5, 0.9, 1.0])
    assert batch.weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])
    assert collate_preferences([hard], pad_id=0).targets is None
