"""Choosing by likelihood: the model takes the continuation that it finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence

from trivium.config import UserError
from trivium.data.collate import Row
from trivium.data.tokenizer import Tokenizer
from trivium.evals.perplexity import row_logprobs
from trivium.evals.tasks import Item
from trivium.models.transformer import Transformer


def choose(model: Transformer, tokenizer: Tokenizer, items: Sequence[Item]) -> list[float]:
    """Return 1 for each item whose right choice is the likeliest, 0 for others; k equally likely ones get 1/k.

    A choice's score is its log-likelihood after the context; divided by its UTF-8 bytes where the choices differ in
    length, so that short ones are not favoured. All models are asked the same raw text, chat models too.
    """
    context = model.config.max_position_embeddings
    rows = [encode_pair(tokenizer, item.context, choice, context) for item in items for choice in item.choices]
    totals = [sum(values) for values in row_logprobs(model, rows)]
    right, start = [], 0
    for item in items:
        scores = totals[start : start + len(item.choices)]
        start += len(item.choices)
        sizes = [len(choice.encode("utf-8")) for choice in item.choices]
        if len(set(sizes)) > 1:
            scores = [score / size for score, size in zip(scores, sizes, strict=True)]
        best = max(scores)
        right.append((scores[item.answer] == best) / scores.count(best))
    return right


def encode_pair(tokenizer: Tokenizer, context: str, choice: str, max_tokens: int) -> Row:
    """Return the ids of `context + choice`, and which of them belong to the choice.

    The two are encoded **together**, as running text would be, and the context's trailing spaces count with the
    choice: byte-level tokens carry their space in front. The choice begins where the ids stop being those of the
    context alone, so a token that spans the boundary counts. A row too long for `max_tokens` loses its beginning.
    Raises UserError for a choice that does not fit by itself.
    """
    stripped = context.rstrip(" ")
    before = tokenizer.encode(stripped)
    whole = tokenizer.encode(context + choice)
    shared = 0
    while shared < min(len(before), len(whole)) and before[shared] == whole[shared]:
        shared += 1
    # Something must stand before the first counted token, also in a model without BOS.
    lead = tokenizer.prefix or ([] if shared else [tokenizer.bos_id])
    ids = [*lead, *whole]
    counted = [False] * (len(lead) + shared) + [True] * (len(whole) - shared)
    if sum(counted) > max_tokens:
        raise UserError(f"a choice of {sum(counted)} tokens does not fit the model's context of {max_tokens}")
    # The row's last token is predicted but never read, so one more than the context fits.
    return ids[-max_tokens - 1 :], counted[-max_tokens - 1 :]
