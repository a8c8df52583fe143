"""How well a model predicts held-out text: log-probabilities of rows, and bits per byte of documents.

Bits per byte compare models whatever their tokenizers: the nats a text costs, over its UTF-8 bytes, over ln 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trivium.batches import IGNORE
from trivium.data.collate import Row, pad_rows
from trivium.data.shards import Shards
from trivium.evals.stats import ratio_interval
from trivium.losses.logprobs import token_logprobs
from trivium.models.transformer import Transformer
from trivium.rewards.learned import bucket

BATCH_TOKENS = 4096
"""Most tokens, padding included, in one forward pass."""


@torch.no_grad()
def row_logprobs(model: Transformer, rows: Sequence[Row], *, temperature: float = 1.0) -> list[list[float]]:
    """Return, for each row (ids, which of them count), the log-probabilities (nats) of the tokens that count.

    A row's first token has nothing before it and is never counted. Rows of like length share a batch; logits are
    computed only where a token counts.
    """
    model.eval()
    device = next(model.parameters()).device
    found: list[list[float]] = [[] for _ in rows]
    for chosen in bucket([len(ids) for ids, _ in rows], BATCH_TOKENS):
        batch = pad_rows([rows[i] for i in chosen], pad_id=0)
        # The last column predicts nothing.
        targets = batch.targets[:, : max(1, batch.targets.shape[1] - 1)].to(device)
        counted = targets != IGNORE
        hidden = model(batch.input_ids[:, : targets.shape[1]].to(device))[counted]
        values = token_logprobs(model.logits(hidden).unsqueeze(0), targets[counted].unsqueeze(0), temperature)[0]
        for i, part in zip(chosen, torch.split(values, counted.sum(1).tolist()), strict=True):
            found[i] = part.tolist()
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentLoss:
    """What one document cost: the nats of each predicted token in order, and the UTF-8 bytes of its text."""

    nats: tuple[float, ...]
    num_bytes: int


def document_losses(model: Transformer, shards: Shards, *, context: int, max_tokens: int) -> list[DocumentLoss]:
    """Return the loss of every token of the first documents that together hold at most `max_tokens` tokens.

    Every token but a document's first (its BOS) is predicted exactly once, the end of the document included; see
    `windows` for documents longer than the context.
    """
    head = shards.head(max_tokens)
    rows: list[Row] = []
    owners: list[int] = []
    for index in range(len(head)):
        pieces = windows(head.document(index).tolist(), context)
        rows += pieces
        owners += [index] * len(pieces)
    nats: list[list[float]] = [[] for _ in range(len(head))]
    for owner, values in zip(owners, row_logprobs(model, rows), strict=True):
        nats[owner] += [-value for value in values]
    return [DocumentLoss(nats=tuple(n), num_bytes=int(b)) for n, b in zip(nats, head.text_bytes.tolist(), strict=True)]


def windows(ids: Sequence[int], context: int) -> list[Row]:
    """Return rows of at most `context` + 1 tokens whose counted tokens are each token after the first, once.

    The first window reads from the document's start; the next ones start at the last token read; the last one is moved
    back, so that it has a full context too, and counts only what is new. Worked, context 3, ids 0..5: `0 1 2 3` counts
    1 2 3, then `2 3 4 5` counts 4 5.
    """
    rows: list[Row] = []
    done = 1
    while done < len(ids):
        end = min(done + context, len(ids))
        start = max(0, end - context - 1)
        rows.append((list(ids[start:end]), [place >= done for place in range(start, end)]))
        done = end
    return rows


def bits_per_byte(losses: Sequence[DocumentLoss], seed: int) -> tuple[float, float, float]:
    """Return the bits per byte over all documents, with the 95% bootstrap interval over documents."""
    return ratio_interval([sum(d.nats) / math.log(2) for d in losses], [d.num_bytes for d in losses], seed)


def bits_saved(first: Sequence[DocumentLoss], second: Sequence[DocumentLoss], seed: int) -> tuple[float, float, float]:
    """Return the bits per byte by which `second` costs less than `first`, with the 95% bootstrap interval.

    Both are losses of the same documents by two models. Documents are drawn, and a document's two losses stay
    together, so what makes one text harder than another is not in the interval. Raises ValueError for other documents.
    """
    if [d.num_bytes for d in first] != [d.num_bytes for d in second]:
        raise ValueError("the losses are not of the same documents")
    saved = [(sum(a.nats) - sum(b.nats)) / math.log(2) for a, b in zip(first, second, strict=True)]
    return ratio_interval(saved, [d.num_bytes for d in first], seed)
