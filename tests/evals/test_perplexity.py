import math

import numpy as np
import pytest
import torch

from trivium.data.shards import open_shards, write_shards
from trivium.evals.perplexity import (
    DocumentLoss,
    bits_per_byte,
    bits_saved,
    document_losses,
    row_logprobs,
    windows,
)

from .conftest import TEXT


class Uniform(torch.nn.Module):
    """Every token equally likely: what it costs is known without a network."""

    def __init__(self, vocab: int):
        super().__init__()
        self.vocab = vocab
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, **_):
        return input_ids.float().unsqueeze(-1)

    def logits(self, hidden):
        return torch.zeros(*hidden.shape[:-1], self.vocab)


def test_rows_equal_one_forward_each_whatever_their_mates(model):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (2, 30, 7, 1, 12):
        ids = torch.randint(0, 320, (length,), generator=generator).tolist()
        rows.append((ids, (torch.rand(length, generator=generator) < 0.6).tolist()))
    for (ids, counted), found in zip(rows, row_logprobs(model, rows, temperature=0.7), strict=True):
        logprobs = (model.logits(model(torch.tensor([ids])))[0] / 0.7).log_softmax(-1)
        expected = [logprobs[t - 1, ids[t]].item() for t in range(1, len(ids)) if counted[t]]
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("context", [1, 2, 3, 5, 7, 50])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 23])
def test_windows_count_every_token_after_the_first_once_in_order(context, length):
    seen = []
    for ids, counted in windows(range(length), context):
        assert len(ids) <= context + 1 and not counted[0]
        seen += [token for token, counts in zip(ids, counted, strict=True) if counts]
    assert seen == list(range(1, length))


def test_windows_by_hand():
    assert windows(range(6), 3) == [
        ([0, 1, 2, 3], [False, True, True, True]),
        ([2, 3, 4, 5], [False, False, True, True]),
    ]


def shards(tmp_path, tokenizer, texts):
    documents = [(ids, len(text.encode())) for ids, text in zip(tokenizer.encode_documents(texts), texts, strict=True)]
    write_shards(tmp_path, documents, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=320)
    return open_shards(tmp_path)


def test_a_uniform_model_costs_log2_of_the_vocabulary_per_token(tokenizer, tmp_path):
    texts = [TEXT, "The cat.", TEXT * 3]
    losses = document_losses(Uniform(320), shards(tmp_path, tokenizer, texts), context=16, max_tokens=10**6)
    assert [len(d.nats) for d in losses] == [len(tokenizer.encode(t)) + 1 for t in texts]  # the text and its end
    tokens, size = sum(len(d.nats) for d in losses), sum(len(t) for t in texts)
    value, low, high = bits_per_byte(losses, seed=0)
    assert value == pytest.approx(tokens * math.log2(320) / size, rel=1e-6)
    assert low <= value <= high


def test_only_the_first_documents_within_the_budget_are_read(tokenizer, tmp_path):
    stored = shards(tmp_path, tokenizer, ["The cat sat."] * 10)
    each = int(stored.lengths[0])
    assert len(document_losses(Uniform(320), stored, context=16, max_tokens=4 * each)) == 4


def test_a_long_document_loses_nothing_but_context(model, tokenizer, tmp_path):
    stored = shards(tmp_path, tokenizer, [TEXT])
    whole = document_losses(model, stored, context=128, max_tokens=10**6)[0].nats
    cut = document_losses(model, stored, context=10, max_tokens=10**6)[0].nats
    assert len(whole) == len(cut) and cut[:10] == pytest.approx(whole[:10], abs=1e-5)
    ids = torch.from_numpy(stored.document(0).astype(np.int64))[None]
    logprobs = model.logits(model(ids[:, :-1]))[0].log_softmax(-1)
    assert whole == pytest.approx((-logprobs.gather(1, ids[0, 1:, None])[:, 0]).tolist(), abs=1e-5)


def test_bits_saved_by_hand_and_documents_stay_paired():
    """8 + 1 bits less over 16 + 2 bytes are 0.5; where every byte saves alike, the interval is a point."""
    first = [DocumentLoss(nats=(bits * math.log(2),), num_bytes=n) for bits, n in ((40, 16), (3, 2))]
    second = [DocumentLoss(nats=(bits * math.log(2),), num_bytes=n) for bits, n in ((32, 16), (2, 2))]
    assert bits_saved(first, second, 0) == pytest.approx((0.5, 0.5, 0.5))
    assert bits_saved(second, first, 0) == pytest.approx((-0.5, -0.5, -0.5))
    assert bits_per_byte(first, 0)[2] - bits_per_byte(first, 0)[1] > 0.5  # though the texts differ in how hard they are
    with pytest.raises(ValueError, match="same documents"):
        bits_saved(first, second[:1], 0)
