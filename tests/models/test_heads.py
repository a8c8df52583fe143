import math

import pytest
import torch
import transformers

from trivium.models.heads import ScalarModel, TwoHeads, score_at
from trivium.models.hf import load_scalar_model, save_model


def rows_of(tokens, lengths):
    rows = [tokens(1, length, seed=length)[0] for length in lengths]
    return rows, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)


def test_transformers_gives_the_same_score(family, tokens, tmp_path):
    scalar = ScalarModel.from_transformer(family, seed=3)
    save_model(tmp_path, scalar, extra={"reward_mean": 0.5, "reward_std": 2.0})
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(theirs).__name__.endswith("ForSequenceClassification")
    assert theirs.config.num_labels == 1
    assert list(theirs.state_dict()) == list(scalar.state_dict())
    lengths = torch.tensor([11, 4, 8])
    _, padded = rows_of(tokens, lengths.tolist())
    with torch.no_grad():
        ours = score_at(scalar(padded), lengths)
        expected = theirs(padded, attention_mask=(padded != 0)).logits[:, 0]
        left = torch.stack([row.roll(11 - length) for row, length in zip(padded, lengths.tolist(), strict=True)])
        expected_left = theirs(left, attention_mask=(left != 0), position_ids=None).logits[:, 0]
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.allclose(ours, expected_left, atol=1e-5)
    loaded = load_scalar_model(tmp_path)
    assert all(torch.equal(tensor, scalar.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_score_depends_on_the_row_only(family, tokens):
    """Row 29: not on how much padding, which batch mates, what the pads are; an eos inside the row changes nothing."""
    scalar = ScalarModel.from_transformer(family, seed=3)
    rows, padded = rows_of(tokens, [5, 12, 9])
    rows[1][3] = padded[1, 3] = 2  # an eos in the middle
    lengths = torch.tensor([5, 12, 9])
    with torch.no_grad():
        together = score_at(scalar(padded), lengths)
        alone = torch.stack([score_at(scalar(row[None]), torch.tensor([len(row)]))[0] for row in rows])
        more = torch.nn.functional.pad(padded, (0, 7), value=2)
        wider = score_at(scalar(more), lengths)
    assert torch.allclose(together, alone, atol=1e-6 * 10)
    assert torch.allclose(together, wider, atol=1e-6 * 10)


def test_a_zero_head_says_zero(tiny, tokens):
    """Row 42."""
    assert ScalarModel.from_transformer(tiny(), zero_init=True)(tokens(2, 6)).eq(0).all()


def test_a_random_head_has_the_documented_scale(tiny):
    model = tiny(hidden_size=1024, num_attention_heads=4, num_hidden_layers=0)
    assert ScalarModel.from_transformer(model).score.weight.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.1)
    assert ScalarModel.from_transformer(model, zero_init=0.5).score.weight.std().item() == pytest.approx(0.5, rel=0.1)
    a, b = (ScalarModel.from_transformer(model, seed=s).score.weight for s in (1, 2))
    assert not torch.equal(a, b)


def test_nothing_is_shared_with_the_source(tiny, tokens):
    model = tiny()
    before = model(tokens(1, 5)).clone()
    scalar = ScalarModel.from_transformer(model)
    with torch.no_grad():
        for parameter in scalar.parameters():
            parameter.zero_()
    assert torch.equal(model(tokens(1, 5)), before)


def test_values_are_float32_under_autocast(tiny, tokens):
    scalar = ScalarModel.from_transformer(tiny())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = scalar(tokens(2, 6))
    assert values.dtype == torch.float32
    assert values.shape == (2, 6)
    assert not torch.equal(values, values.bfloat16().float())


def test_score_at_by_hand():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert score_at(values, torch.tensor([2, 3])).tolist() == [2.0, 6.0]


def test_two_heads_on_one_trunk(tiny, tokens):
    model, ids = tiny(), tokens(2, 9)
    beside = ScalarModel.beside(model)
    assert beside.model is model.model and beside.score.weight.requires_grad
    assert not beside(ids).any(), "every value is 0 at first"
    both = TwoHeads(model, beside)
    names = [name for name, _ in both.named_parameters()]
    assert len(names) == len(list(model.named_parameters())) + 1 and "value.score.weight" in names
    with torch.no_grad():
        beside.score.weight.fill_(1.0)
        before = beside(ids)
        model.model.norm.weight.mul_(1.5)
    assert torch.allclose(beside(ids), before * 1.5, atol=1e-4), "the trunk is the language model's own"
    assert torch.equal(beside(ids), beside.read(model(ids)))
    with pytest.raises(ValueError, match="trunk of its own"):
        TwoHeads(model, ScalarModel.from_transformer(model))
