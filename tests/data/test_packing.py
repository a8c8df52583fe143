"""Packed rows: what stands in them, that nothing crosses from one conversation to another, that padding is saved."""

import random

import pytest
import torch

from trivium.batches import IGNORE
from trivium.data.chat import Rendered
from trivium.data.collate import pad_rows
from trivium.data.conversations import Deal, Side
from trivium.data.loader import RowLoader
from trivium.data.packing import pack, pack_rows, packed_length, padding_frac
from trivium.losses.cross_entropy import head_cross_entropy
from trivium.models.config import ModelConfig
from trivium.models.transformer import Transformer

PAD = 0


def drawn_rows(num, seed=3, longest=20):
    """Return rows of ids 5 to 31, trained on their second halves."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num):
        length = rng.randint(4, longest)
        ids = [rng.randint(5, 31) for _ in range(length)]
        rows.append((ids, [index >= length // 2 for index in range(length)]))
    return rows


def network():
    config = ModelConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        qk_norm=True,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PAD,
    )
    model = Transformer(config)
    model.init_weights(0)
    return model


def test_best_fit_decreasing_by_hand():
    """7 opens a row, so does 5; 4 fits only beside 5; 3 fills the 7's row; 1 the other's."""
    lengths = [1, 3, 7, 4, 5]
    assert [[lengths[i] for i in row] for row in pack(lengths, 10, seed=0)] == [[7, 3], [5, 4, 1]]
    # The fullest row that fits: 2 goes beside 8, which leaves no room, not beside 7, which would leave 1.
    assert [[[7, 8, 2][i] for i in row] for row in pack([7, 8, 2], 10, seed=0)] == [[8, 2], [7]]
    with pytest.raises(ValueError, match="an item of 11 does not fit into a row of 10"):
        pack([11], 10, seed=0)


def test_every_item_is_packed_once_within_capacity_and_the_rows_are_a_function_of_the_seed():
    rng = random.Random(1)
    for capacity in (16, 50):
        lengths = [rng.randint(1, capacity) for _ in range(300)]
        rows = pack(lengths, capacity, seed=5)
        assert sorted(item for row in rows for item in row) == list(range(300))
        assert all(sum(lengths[item] for item in row) <= capacity for row in rows)
        # Any two rows together would not fit into one, else the later would not have been opened.
        fullest = sorted(sum(lengths[item] for item in row) for row in rows)
        assert fullest[0] + fullest[1] > capacity
        assert rows == pack(lengths, capacity, seed=5) != pack(lengths, capacity, seed=6)


def test_the_worked_example_of_the_docstring():
    rows = [([3, 10, 4, 11, 7], [0, 0, 0, 1, 1]), ([3, 12, 4, 13, 7], [0, 0, 0, 1, 1])]
    batch = pack_rows([rows], PAD)
    wanted = [3, 10, 4, 11, 3, 12, 4, 13]
    assert batch.input_ids[0].tolist() == wanted
    assert batch.targets[0].tolist() == [IGNORE, IGNORE, 11, 7, IGNORE, IGNORE, 13, 7]
    assert batch.document_ids[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    padded = pack_rows([rows, rows[:1]], PAD)
    assert padded.input_ids[1].tolist() == [3, 10, 4, 11, PAD, PAD, PAD, PAD]
    assert padded.document_ids[1].tolist() == [0, 0, 0, 0, -1, -1, -1, -1]
    assert padded.weights is None


def test_as_many_targets_as_the_conversations_have_trained_tokens_after_their_first():
    """No target is lost at a border, and none crosses one (row 10)."""
    rows = drawn_rows(40)
    packs = pack([packed_length(row) for row in rows], 24, seed=0)
    batch = pack_rows([[rows[i] for i in each] for each in packs], PAD)
    assert int(batch.num_items) == sum(sum(trained[1:]) for _, trained in rows) == int(pad_rows(rows, PAD).num_items)
    everything = [(ids, [True] * len(ids)) for ids, _ in rows]
    whole = pack_rows([[everything[i] for i in each] for each in packs], PAD)
    assert int(whole.num_items) == sum(len(ids) - 1 for ids, _ in rows)


def loss_and_gradients(model, batch):
    model.zero_grad()
    hidden = model(batch.input_ids, positions=batch.positions, document_ids=batch.document_ids)
    losses = head_cross_entropy(hidden, model.lm_head.weight, batch.targets)
    total = (losses if batch.weights is None else losses * batch.weights).sum() / batch.num_items
    total.backward()
    return total.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("weighted", [False, True])
def test_packed_is_unpacked(weighted):
    """The same conversations, one to a row or packed: loss and gradients agree (row 9), with weights too."""
    model, rows = network(), drawn_rows(24)
    weights = [[0.5 + i % 3] * len(ids) for i, (ids, _) in enumerate(rows)] if weighted else None
    side = Side(rows=rows, weights=weights)
    packs = pack([packed_length(row) for row in rows], 40, seed=0)
    assert len(packs) < 12
    loss, gradients = loss_and_gradients(model, side.packed(packs, PAD))
    wanted, expected = loss_and_gradients(model, side.batch(range(24), PAD))
    torch.testing.assert_close(loss, wanted, rtol=2e-6, atol=0)
    assert float((gradients - expected).norm() / expected.norm()) < 1e-5
    if weighted:
        plain, _ = loss_and_gradients(model, Side(rows=rows).batch(range(24), PAD))
        assert abs(float(plain - wanted)) > 1e-4


def test_a_conversation_sees_nothing_of_its_neighbours():
    """Every token of A another one: B's logits are equal to the bit (row 9); without the mask they would not be."""
    model = network().eval()
    first, second = drawn_rows(2, seed=8)
    other = ([5 + (token - 4) % 27 for token in first[0]], first[1])
    start = packed_length(first)
    logits = []
    for neighbour in (first, other):
        batch = pack_rows([[neighbour, second]], PAD)
        with torch.no_grad():
            masked = model.logits(model(batch.input_ids, positions=batch.positions, document_ids=batch.document_ids))
            open_ = model.logits(model(batch.input_ids, positions=batch.positions))
        logits.append((masked[0, start:], open_[0, start:]))
    assert torch.equal(logits[0][0], logits[1][0])
    assert not torch.equal(logits[0][1], logits[1][1])


def test_batches_are_a_pure_function_of_the_step_and_dealt_to_ranks():
    """Any order of asking gives the same; the ranks' rows together are the global batch; an epoch has each once."""
    side = Side(rows=drawn_rows(50))
    deal, again = Deal(side, 4, 7, PAD, context=40, numbered=True), Deal(side, 4, 7, PAD, context=40, numbered=True)
    steps = range(2 * deal.loader.num_batches_per_epoch)
    batches = {step: deal.batch(step) for step in steps}
    for step in reversed(steps):
        assert torch.equal(again.batch(step).input_ids, batches[step].input_ids)
        parts = [again.batch(step, rank, 2) for rank in range(2)]
        assert [int(part.row_numbers[i]) for i in range(2) for part in parts] == batches[step].row_numbers.tolist()
        assert sum(int(part.num_items) for part in parts) == int(batches[step].num_items)
    assert batches[1].row_numbers.tolist() == [4, 5, 6, 7]
    # An epoch is 14 rows: three whole batches and the first two rows of the fourth.
    rows = [row for step in range(4) for row in deal.loader.rows(step)][: deal.loader.num_rows]
    assert deal.loader.num_rows == 14
    assert sorted(i for row in rows for i in deal.packs[row]) == list(range(50))


def test_the_share_of_padding_is_measured_and_packing_saves_it():
    """By hand: lengths 2 and 4 in one batch are 2 pads of 8. Packed, mixed lengths pad far less than sorted ones."""
    assert padding_frac(RowLoader(2, 2, 0), [2, 4]) == pytest.approx(2 / 8)
    assert padding_frac(RowLoader(4, 2, 0, lengths=[1, 3, 1, 3]), [1, 3, 1, 3]) == 0
    facts = Deal(Side(rows=drawn_rows(200)), 8, 0, PAD, context=60).facts()["packing"]
    assert facts["padding_frac"] < 0.5 * facts["padding_frac_unpacked"]  # 1.3% against 4.3%, although sorted by length
    assert Deal(Side(rows=drawn_rows(20)), 8, 0, PAD).facts() == {}


def test_weights_follow_their_tokens():
    """Only trained targets carry the weight of their token; the batch then counts weights, not tokens."""
    rows = [([5, 6, 7, 8], [False, False, True, True]), ([5, 6, 7], [False, True, True])]
    weights = [[0, 0, 2.0, 2.0], [0, 0.5, 0.5]]
    batch = pad_rows(rows, PAD, weights)
    assert batch.weights.tolist() == [[0, 2, 2, 0], [0.5, 0.5, 0, 0]]
    assert float(batch.num_items) == 5
    packed = pack_rows([rows], PAD, [weights])
    assert packed.weights.tolist() == [[0, 2, 2, 0.5, 0.5]]
    ones = [Rendered(input_ids=ids, trained=t, weights=[float(x) for x in t]) for ids, t in rows]
    assert Side.of(ones).weights is None
    assert Side.of([*ones, Rendered(input_ids=[5, 6], trained=[False, True], weights=[0, 2.0])]).weights is not None
