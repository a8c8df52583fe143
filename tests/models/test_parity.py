"""Logits and all gradients equal transformers' on random small models, however the rows are laid out.

Thirty shapes over the five families, each a pure function of its seed: heads, grouped heads, head size, base and
scaling of RoPE (with positions beyond the original context), tied or not, epsilon, window shorter than the row, layers
with and without it. fp32 on CPU; the bar is 1e-5 of the largest logit, and of each gradient's norm. (Two orders of
summing differ by about 4e-7 and 3e-7; a wrong mask or position by more than 1e-2.)
"""

import random
from typing import Any

import pytest
import torch

from trivium.models.transformer import KVCache

BAR = 1e-5
LENGTH = 20
SEEDS = range(30)
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "olmo2")
SCALINGS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
)


def random_shape(seed: int) -> dict[str, Any]:
    """Return a shape; every family meets every scaling, and with 30 seeds every choice below is made."""
    draw = random.Random(seed)
    family = FAMILIES[seed % 5]
    heads = draw.choice([1, 2, 4, 6])
    layers = draw.choice([1, 2, 3])
    size = draw.choice([4, 8, 16] if heads > 1 else [8, 16])  # 4 numbers in all would be mostly cancellation
    free = family in ("qwen3", "mistral") and draw.random() < 0.5  # a head size of its own
    shape: dict[str, Any] = {
        "hidden_size": draw.choice([16, 24]) * (1 if free else heads) if free else heads * size,
        "head_dim": size if free else None,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([k for k in range(1, heads + 1) if heads % k == 0]),
        "num_hidden_layers": layers,
        "intermediate_size": draw.choice([8, 40]),
        "max_position_embeddings": 32,
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-3]),
        "rope_theta": draw.choice([100.0, 1e4, 1e6]),
        "rope_scaling": SCALINGS[(seed // 5) % 4],
        "tie_word_embeddings": draw.random() < 0.5,
        "attention_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "post_norm": family == "olmo2",
    }
    if family == "mistral" or (family in ("qwen2", "qwen3") and draw.random() < 0.6):
        shape["sliding_window"] = draw.choice([1, 3, 7])
        if family != "mistral" and layers > 1:
            kinds = [draw.choice(["full_attention", "sliding_attention"]) for _ in range(layers)]
            shape["layer_types"] = tuple(kinds) if len(set(kinds)) == 2 else None
    return shape


@pytest.fixture(params=SEEDS)
def pair(request, tiny, reference):
    """Our model and transformers', with the same random weights."""
    ours = tiny(**random_shape(request.param))
    return ours, reference(ours)


def assert_same(ours, theirs, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare logits [positions, vocabulary], then the gradients of a sum that weighs every logit differently."""
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= BAR * expected.abs().max()
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    for model, logits in ((ours, found), (theirs, expected)):
        model.zero_grad()
        (logits.log_softmax(-1) * weights).sum().backward()
    gradients = dict(theirs.named_parameters())
    # A gradient that is zero but for rounding (all of it, where one position is seen) has no relative error.
    scale = max(parameter.grad.norm() for parameter in gradients.values())
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad - gradients[name].grad).norm()
        assert difference <= BAR * gradients[name].grad.norm() + 1e-7 * scale, name


def padded_rows(tokens, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of rows of 20, 13, 1 and 6 tokens, padded on one side."""
    ids, mask = torch.zeros(4, LENGTH, dtype=torch.long), torch.zeros(4, LENGTH, dtype=torch.bool)
    for row, length in enumerate((20, 13, 1, 6)):
        place = slice(0, length) if side == "right" else slice(LENGTH - length, LENGTH)
        ids[row, place], mask[row, place] = tokens(1, length, seed=length)[0], True
    return ids, mask


def test_right_padded_rows(pair, tokens):
    """Ours need no mask there; theirs are given one."""
    ours, theirs = pair
    ids, mask = padded_rows(tokens, "right")
    expected = theirs(ids, attention_mask=mask.long()).logits
    assert_same(ours, theirs, ours.logits(ours(ids))[mask], expected[mask])


def test_left_padded_rows(pair, tokens):
    ours, theirs = pair
    ids, mask = padded_rows(tokens, "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = ours.logits(ours(ids, positions=positions, attention_mask=mask))
    expected = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
    assert_same(ours, theirs, found[mask], expected[mask])


def test_packed_documents_against_rows_of_their_own(pair, tokens):
    """Rows 9 and 10: three documents in a row; and what stands in one of them is nothing to the others, to the bit."""
    ours, theirs = pair
    lengths = [7, 1, 12]
    documents = [tokens(1, length, seed=length) for length in lengths]
    packed = torch.cat(documents, 1)
    places = {
        "document_ids": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None],
        "positions": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    found = ours.logits(ours(packed, **places))
    expected = torch.cat([theirs(document).logits for document in documents], 1)
    assert_same(ours, theirs, found[0], expected[0])
    changed = packed.clone()
    changed[0, 3] = 5
    with torch.no_grad():
        other = ours.logits(ours(changed, **places))
    assert torch.equal(other[:, 7:], found[:, 7:])
    assert not torch.equal(other[:, :7], found[:, :7])


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [11, 1, 5, 3]])
def test_decoding_with_a_cache_beyond_the_window(pair, tokens, pieces):
    ours, theirs = pair
    ids = tokens(2, LENGTH)
    cache = KVCache(ours.config, batch_size=2, capacity=LENGTH)
    with torch.no_grad():
        found = torch.cat([ours.logits(ours(piece, cache=cache)) for piece in ids.split(pieces, dim=1)], 1)
        expected = theirs(ids).logits
    assert (found - expected).abs().max() <= BAR * expected.abs().max()


def test_the_seeds_meet_every_choice():
    shapes = [random_shape(seed) for seed in SEEDS]
    for name, least in [
        ("rope_scaling", 4),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 3),
        ("rope_theta", 3),
        ("rms_norm_eps", 3),
        ("sliding_window", 4),
        ("tie_word_embeddings", 2),
        ("head_dim", 3),
    ]:
        assert len({str(shape.get(name)) for shape in shapes}) >= least, name
    assert sum(shape.get("layer_types") is not None for shape in shapes) >= 3
