"""The loaders: every token once an epoch, no target across documents, and the same order for any number of ranks."""

from collections import Counter

import numpy as np
import pytest
import torch

from trivium.batches import IGNORE
from trivium.data.loader import PretrainLoader, ReplayLoader, RowLoader
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


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    """Documents as those of `shards`, with tokens from 10,000 on, so that a row shows which kind it is of."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("general")
    documents = [([10_000 + 100 * d + i for i in range(int(rng.integers(2, 31)))], 5) for d in range(31)]
    write_shards(folder, documents, tokenizer_fingerprint="f", vocab_size=20_000)
    return open_shards(folder)


def mix(shards, general, frac, batch_size=6):
    loaders = (PretrainLoader(shards, CONTEXT, batch_size, 3), PretrainLoader(general, CONTEXT, batch_size, (3, 1)))
    return ReplayLoader(*loaders, frac)


def is_general(row):
    return max(row[0]) >= 10_000


def test_replay_is_spread_evenly_and_exact(shards, general):
    """The docstring's example; and of the first n rows exactly the whole part of n f are general, for any f."""
    loader = mix(shards, general, 0.25)
    kinds = ["g" if is_general(row) else "d" for step in range(2) for row in rows_of(loader.batch(step))]
    assert "".join(kinds) == "dddgdd" + "dgdddg"
    for frac, per_thousand in ((0.0, 0), (0.1, 100), (0.29, 290), (0.5, 500), (0.999, 999), (1.0, 1000)):
        loader = mix(shards, general, frac)
        places = [loader.place(row)[0] is loader.general for row in range(1000)]
        assert [sum(places[:n]) for n in range(1001)] == [n * per_thousand // 1000 for n in range(1001)]
        assert loader.num_replayed(1000) == per_thousand


@pytest.mark.parametrize("frac", [0.0, 0.25, 0.3, 1.0])
def test_replay_leaves_each_kind_in_its_own_order(shards, general, frac):
    """What is left of the batches without the other kind is what that kind's loader gives, row for row."""
    loader = mix(shards, general, frac)
    mixed = [row for step in range(40) for row in rows_of(loader.batch(step))]
    for own, kind in ((loader.domain, False), (loader.general, True)):
        expected = [row for step in range(40) for row in rows_of(own.batch(step))]
        found = [row for row in mixed if is_general(row) == kind]
        assert found == expected[: len(found)]
    if not frac:
        assert mixed == [row for step in range(40) for row in rows_of(loader.domain.batch(step))]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_replay_is_a_pure_function_of_the_step_for_any_number_of_ranks(shards, general, world):
    """Ranks hold each row of the global batch once; a loader that resumes at any step reads on alike."""
    loader = mix(shards, general, 0.3, batch_size=8)
    whole = [rows_of(loader.batch(step)) for step in range(24)]
    assert any(map(is_general, whole[0])) and not all(map(is_general, whole[0]))
    for step, expected in enumerate(whole):
        resumed = mix(shards, general, 0.3, batch_size=8)
        parts = [rows_of(resumed.batch(step, rank, world)) for rank in range(world)]
        assert [parts[i % world][i // world] for i in range(8)] == expected
    with pytest.raises(ValueError, match="cannot be shared"):
        loader.batch(0, 0, 9)


def test_replay_that_cannot_be_is_refused(shards, general):
    domain = PretrainLoader(shards, CONTEXT, 4, 0)
    for other, frac in ((None, 0.1), (domain, 1.1), (domain, -0.1), (PretrainLoader(general, CONTEXT + 1, 4, 0), 0.5)):
        with pytest.raises(ValueError):
            ReplayLoader(domain, other, frac)
    assert rows_of(ReplayLoader(domain, None, 0.0).batch(3)) == rows_of(domain.batch(3))


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
