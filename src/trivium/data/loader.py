"""Which rows make up a batch: pure functions of seed and step, so that there is no loader state to save or to lose.

Every epoch is a new permutation. The order is fixed first and then dealt to ranks, so the global batch of a step is
the same for any number of ranks, and a run resumed at step k reads what it would have read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from trivium.batches import IGNORE, TokenBatch
from trivium.data.shards import Shards

POOL_BATCHES = 16
"""Bucketing by length sorts within pools of this many batches: padding falls, batches stay mixed."""


class PretrainLoader:
    """Packs documents into rows of `context` tokens: windows of the stream of shuffled documents.

    A document that reaches past a row goes on in the next one, where its positions start at 0 again and it sees
    nothing of the row before; the last token before the cut still predicts the first after it. So an epoch has
    exactly `sum(len - 1)` targets, and no target crosses from one document to another. The last row of an epoch is
    padded. One row of two documents and the beginning of a third, context 8::

        input_ids     <bos> a b <eos>  <bos> c <eos>  <bos>
        targets        a    b <eos> -100  c <eos> -100  d
        document_ids   0    0 0  0      1   1  1      2
        positions      0    1 2  3      0   1  2      0
    """

    def __init__(self, shards: Shards, context: int, batch_size: int, seed: int | None, *, pad_id: int = 0) -> None:
        """Prepare to read; `batch_size` counts rows over all ranks; seed None keeps the documents' order."""
        if context < 1 or batch_size < 1:
            raise ValueError(f"context {context} and batch_size {batch_size} must be at least 1")
        self.shards = shards
        self.context = context
        self.batch_size = batch_size
        self.seed = seed
        self.pad_id = pad_id
        self.num_rows = -(-shards.num_tokens // context)
        """Rows in an epoch."""
        self._epoch = functools.lru_cache(maxsize=2)(self._order)

    @property
    def num_batches_per_epoch(self) -> int:
        """Batches until every document has been seen (the last one may reach into the next epoch)."""
        return -(-self.num_rows // self.batch_size)

    def row_ids(self, step: int) -> list[tuple[int, int]]:
        """Return the (epoch, row) of each row of a step's global batch, whatever the number of ranks."""
        first = step * self.batch_size
        return [divmod(index, self.num_rows) for index in range(first, first + self.batch_size)]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> TokenBatch:
        """Return one rank's rows of the batch at `step`: every `world`-th row of the global batch.

        Raises ValueError when a rank would get no row.
        """
        if world > self.batch_size:
            raise ValueError(f"batch_size {self.batch_size} cannot be shared by {world} ranks")
        return self._pack(self.row_ids(step)[rank::world])

    def epoch_batches(self, rank: int = 0, world: int = 1) -> Iterator[TokenBatch]:
        """Yield every row of the first epoch exactly once (the last batch may be smaller): for evaluation."""
        rows = [(0, row) for row in range(self.num_rows)]
        for first in range(0, self.num_rows, self.batch_size):
            mine = rows[first : first + self.batch_size][rank::world]
            if mine:
                yield self._pack(mine)

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return an epoch's document order and where in its stream of tokens each of them ends."""
        count = len(self.shards)
        order = np.arange(count) if self.seed is None else np.random.default_rng([self.seed, epoch]).permutation(count)
        return order, np.cumsum(self.shards.lengths[order])

    def _pack(self, rows: Sequence[tuple[int, int]]) -> TokenBatch:
        shape = (len(rows), self.context)
        input_ids = np.full(shape, self.pad_id, dtype=np.int64)
        targets = np.full(shape, IGNORE, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        # Pads form a document of their own, so attention within it is defined and touches nothing else.
        document_ids = np.full(shape, -1, dtype=np.int64)
        for index, (epoch, row) in enumerate(rows):
            self._fill(epoch, row, input_ids[index], targets[index], positions[index], document_ids[index])
        arrays = (input_ids, targets, positions, document_ids)
        ids, shifted, places, documents = (torch.from_numpy(array) for array in arrays)
        return TokenBatch(input_ids=ids, targets=shifted, positions=places, document_ids=documents)

    def _fill(self, epoch: int, row: int, *into: NDArray[np.int64]) -> None:
        """Write one row's ids, targets, positions and document numbers."""
        input_ids, targets, positions, document_ids = into
        order, ends = self._epoch(epoch)
        at = row * self.context
        stop = min(at + self.context, int(ends[-1]))
        place = int(np.searchsorted(ends, at, side="right"))
        column = number = 0
        while at < stop:
            document = int(order[place])
            start = at - int(ends[place] - self.shards.lengths[document])
            count = min(stop, int(ends[place])) - at
            # One token more than fits: the cut-off continuation still is this row's last target.
            ids = self.shards.document(document, start, start + count + 1)
            input_ids[column : column + count] = ids[:count]
            targets[column : column + len(ids) - 1] = ids[1 : count + 1]
            positions[column : column + count] = np.arange(count)
            document_ids[column : column + count] = number
            at, column, number, place = at + count, column + count, number + 1, place + 1


class RowLoader:
    """Deals out row numbers for conversations, preference groups or prompts: `rows(step)` is a pure function.

    With `lengths`, rows of similar length come together (less padding); each epoch still is a permutation.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        """Prepare; `batch_size` counts rows over all ranks; `lengths` are the rows' tokens; no row is a ValueError."""
        if num_rows < 1 or batch_size < 1:
            raise ValueError(f"num_rows {num_rows} and batch_size {batch_size} must be at least 1")
        if lengths is not None and len(lengths) != num_rows:
            raise ValueError(f"{len(lengths)} lengths for {num_rows} rows")
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._epoch = functools.lru_cache(maxsize=2)(self._order)

    @property
    def num_batches_per_epoch(self) -> int:
        """Batches until every row has been seen (the last one may reach into the next epoch)."""
        return -(-self.num_rows // self.batch_size)

    def rows(self, step: int, rank: int = 0, world: int = 1) -> list[int]:
        """Return one rank's row numbers at `step`: every `world`-th of the global batch."""
        first = step * self.batch_size
        indices = [divmod(index, self.num_rows) for index in range(first, first + self.batch_size)]
        return [int(self._epoch(epoch)[row]) for epoch, row in indices[rank::world]]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the permutation of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.num_rows)
        if self._lengths is None:
            return order
        pool = self.batch_size * POOL_BATCHES
        pools = [order[i : i + pool] for i in range(0, len(order), pool)]
        ordered = np.concatenate([p[np.argsort(self._lengths[p], kind="stable")] for p in pools])
        batches = [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]
        return np.concatenate([batches[i] for i in rng.permutation(len(batches))])
