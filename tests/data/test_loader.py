"""The loaders: every token once an epoch, no target across documents, and the same order for any number of ranks."""

from collections import Counter

import numpy as np
import pytest
import torch

from trivium.batches import IGNORE
from trivium.data.loader import PretrainLoader, RowLoader
from trivium.data.shards import open_shards, write_shards

CONTEXT = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Documents of 2 to 30 distinct tokens: token = 100 * document + place, so that every one can be traced."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("shards")
    documents = [([100 * d + 1 + i for i in range(int(rng.integers(2, 31)))], 5) for d in range(23)]
    write_shards(folder, documents, tokenizer_fingerprint="f", vocab_size=3000, shard_tokens=90)
    return open_shards(folder)


def rows_of(batch):
    return [
        [t[i].tolist() for t in (batch.input_ids, batch.targets, batch.positions, batch.document_ids)]
        for i in range(len(batch.input_ids))
    ]


def test_the_worked_example_of_the_docstring(tmp_path):
    write_shards(
        tmp_path, [([1, 10, 11, 2], 2), ([1, 12, 2], 1), ([1, 13, 2], 1)], tokenizer_fingerprint="f", vocab_size=300
    )
    batch = PretrainLoader(open_shards(tmp_path), 8, 2, seed=None).batch(0)
    assert batch.input_ids.tolist() == [[1, 10, 11, 2, 1, 12, 2, 1], [13, 2, 0, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[10, 11, 2, IGNORE, 12, 2, IGNORE, 13], [2] + [IGNORE] * 7]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2], [0, 0] + [-1] * 6]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1] + [0] * 6]


def test_an_epoch_holds_every_token_once_and_len_minus_one_targets(shards):
    for seed in (None, 0, 1):
        loader = PretrainLoader(shards, CONTEXT, 3, seed)
        tokens, targets = Counter(), Counter()
        for batch in loader.epoch_batches():
            real = batch.document_ids >= 0
            tokens.update(batch.input_ids[real].tolist())
            targets.update(batch.targets[batch.targets != IGNORE].tolist())
            assert (batch.targets[~real] == IGNORE).all()
        everything = Counter(int(t) for d in range(len(shards)) for t in shards.document(d))
        assert tokens == everything
        assert targets.total() == sum(int(n) - 1 for n in shards.lengths)
        assert targets == everything - Counter(int(shards.document(d)[0]) for d in range(len(shards)))


def test_no_target_crosses_a_document_and_positions_restart(shards):
    loader = PretrainLoader(shards, CONTEXT, 4, seed=3)
    for step in range(30):
        for ids, targets, positions, documents in rows_of(loader.batch(step)):
            for i, target in enumerate(targets):
                assert target == IGNORE or target == ids[i] + 1  # consecutive within a document by construction
                assert target == IGNORE or target // 100 == ids[i] // 100
            for i in range(1, len(ids)):
                same = documents[i] == documents[i - 1] != -1
                assert positions[i] == (positions[i - 1] + 1 if same else 0)
                assert not same or ids[i] == ids[i - 1] + 1
            assert positions[0] == 0


def test_batches_are_a_pure_function_of_the_step(shards):
    one, other = PretrainLoader(shards, CONTEXT, 4, seed=3), PretrainLoader(shards, CONTEXT, 4, seed=3)
    forward = [one.batch(step) for step in range(2 * one.num_batches_per_epoch)]
    for step in reversed(range(len(forward))):  # as after a resume, in any order
        assert torch.equal(other.batch(step).input_ids, forward[step].input_ids)
        assert torch.equal(other.batch(step).targets, forward[step].targets)
    assert not torch.equal(PretrainLoader(shards, CONTEXT, 4, seed=4).batch(0).input_ids, forward[0].input_ids)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_ranks_share_each_global_batch_without_overlap(shards, world):
    loader = PretrainLoader(shards, CONTEXT, 8, seed=5)
    for step in range(4):
        whole = rows_of(loader.batch(step))
        parts = [rows_of(loader.batch(step, rank, world)) for rank in range(world)]
        merged = [parts[i % world][i // world] for i in range(8)]
        assert merged == whole
    rows = RowLoader(50, 8, seed=5)
    for step in range(14):
        parts = [rows.rows(step, rank, world) for rank in range(world)]
        assert [parts[i % world][i // world] for i in range(8)] == rows.rows(step)


def test_epochs_differ_and_more_ranks_than_rows_are_refused(shards):
    loader = PretrainLoader(shards, CONTEXT, 1, seed=0)
    first = [loader.batch(i).input_ids.tolist() for i in range(loader.num_rows)]
    second = [loader.batch(i + loader.num_rows).input_ids.tolist() for i in range(loader.num_rows)]
    assert first != second
    with pytest.raises(ValueError, match="cannot be shared"):
        loader.batch(0, 0, 2)


@pytest.mark.parametrize("lengths", [None, [(i * 37) % 101 for i in range(50)]], ids=["plain", "bucketed"])
def test_rows_of_an_epoch_are_a_permutation(lengths):
    loader = RowLoader(50, 7, seed=1, lengths=lengths)
    dealt = [row for step in range(50) for row in loader.rows(step)]
    for epoch in range(7):
        assert sorted(dealt[epoch * 50 : epoch * 50 + 50]) == list(range(50))
    assert dealt[:50] != dealt[50:100]
    assert loader.num_batches_per_epoch == 8


def test_bucketing_saves_padding():
    lengths = np.random.default_rng(0).integers(10, 500, 2000).tolist()

    def padding(loader):
        batches = [[lengths[row] for row in loader.rows(step)] for step in range(100)]
        return sum(max(b) * len(b) - sum(b) for b in batches)

    assert padding(RowLoader(2000, 16, 0, lengths)) < 0.3 * padding(RowLoader(2000, 16, 0))


def test_wrong_sizes_are_refused(shards):
    for wrong in (lambda: RowLoader(0, 4, 0), lambda: RowLoader(3, 0, 0), lambda: RowLoader(3, 1, 0, [1])):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(ValueError):
        PretrainLoader(shards, 0, 1, 0)
