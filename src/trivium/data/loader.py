"""Which rows make up a batch: pure functions of seed and step, so that there is no loader state to save or to lose.

Every epoch is a new permutation. The order is fixed first and then dealt to ranks, so the global batch of a step is
the same for any number of ranks, and a run resumed at step k reads what it would have read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from fractions import Fraction

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

    def __init__(
        self, shards: Shards, context: int, batch_size: int, seed: int | tuple[int, ...] | None, *, pad_id: int = 0
    ) -> None:
        """Prepare to read; `batch_size` counts rows over all ranks; seed None keeps the documents' order."""
        if context < 1 or batch_size < 1:
            raise ValueError(f"context {context} and batch_size {batch_size} must be at least 1")
        self.shards = shards
        self.context = context
        self.batch_size = batch_size
        self.seed = (seed,) if isinstance(seed, int) else seed
        self.pad_id = pad_id
        self.num_rows = -(-shards.num_tokens // context)
        """Rows in an epoch."""
        self._epoch = functools.lru_cache(maxsize=2)(self._order)

    @property
    def num_batches_per_epoch(self) -> int:
        """Batches until every document has been seen (the last one may reach into the next epoch)."""
        return -(-self.num_rows // self.batch_size)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> TokenBatch:
        """Return one rank's rows of the batch at `step`: every `world`-th row of the global batch.

        Raises ValueError when a rank would get no row.
        """
        return _pack([(self, row) for row in _rows_of(step, self.batch_size, rank, world)])

    def epoch_batches(self, rank: int = 0, world: int = 1) -> Iterator[TokenBatch]:
        """Yield every row of the first epoch exactly once (the last batch may be smaller): for evaluation."""
        for first in range(0, self.num_rows, self.batch_size):
            mine = range(first, min(first + self.batch_size, self.num_rows))[rank::world]
            if mine:
                yield _pack([(self, row) for row in mine])

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return an epoch's document order and where in its stream of tokens each of them ends."""
        count = len(self.shards)
        order = np.arange(count) if self.seed is None else np.random.default_rng([*self.seed, epoch]).permutation(count)
        return order, np.cumsum(self.shards.lengths[order])

    def fill(self, index: int, *into: NDArray[np.int64]) -> None:
        """Write ids, targets, positions and document numbers, each [context], of row `index` counted over epochs."""
        input_ids, targets, positions, document_ids = into
        epoch, row = divmod(index, self.num_rows)
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


class ReplayLoader:
    """Mixes rows of general text among those of a domain, evenly: a model that learns the one is reminded of the other.

    The rows of a run are counted over all its batches, and row i is a general one where floor((i + 1) f) is above
    floor(i f), f being `replay_frac`. So any n rows in a row hold n f general ones, rounded up or down, and the first n
    exactly floor(n f). Each kind is read in its own order, epoch after epoch: what the k-th row of the domain is does
    not depend on f. Worked, f = 0.25, batches of 6: `d0 d1 d2 g0 d3 d4`, `d5 g1 d6 d7 d8 g2`.
    """

    def __init__(self, domain: PretrainLoader, general: PretrainLoader | None, replay_frac: float) -> None:
        """Prepare to mix; the batch's size is the domain's.

        Raises ValueError for contexts that differ, a fraction outside 0 to 1, and for a replay of no text.
        """
        if not 0 <= replay_frac <= 1 or (replay_frac and general is None):
            raise ValueError(f"replay_frac {replay_frac} of {'no' if general is None else 'general'} text")
        if general is not None and general.context != domain.context:
            raise ValueError(f"rows of {domain.context} and of {general.context} tokens cannot stand in one batch")
        self.domain, self.general = domain, general or domain
        # As it is written, 0.1 is a tenth; its nearest binary fraction would one day be a row too many.
        self.replay_frac = Fraction(str(replay_frac))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> TokenBatch:
        """Return one rank's rows of the batch at `step`: every `world`-th row of the global batch.

        Raises ValueError when a rank would get no row.
        """
        return _pack([self.place(row) for row in _rows_of(step, self.domain.batch_size, rank, world)])

    def num_replayed(self, rows: int) -> int:
        """Return how many of the first `rows` rows are general ones."""
        return int(rows * self.replay_frac)

    def place(self, row: int) -> tuple[PretrainLoader, int]:
        """Return the loader that row `row` of the run comes from, and which of its rows it is."""
        replayed, then = self.num_replayed(row), self.num_replayed(row + 1)
        return (self.general, replayed) if then > replayed else (self.domain, row - replayed)


def _rows_of(step: int, batch_size: int, rank: int, world: int) -> range:
    """Return the numbers of one rank's rows at `step`, counted over the whole run."""
    if world > batch_size:
        raise ValueError(f"batch_size {batch_size} cannot be shared by {world} ranks")
    return range(step * batch_size, (step + 1) * batch_size)[rank::world]


def _pack(rows: Sequence[tuple[PretrainLoader, int]]) -> TokenBatch:
    """Return rows, each named by its loader and its number there, as a batch."""
    first = rows[0][0]
    shape = (len(rows), first.context)
    input_ids = np.full(shape, first.pad_id, dtype=np.int64)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    # Pads form a document of their own, so attention within it is defined and touches nothing else.
    document_ids = np.full(shape, -1, dtype=np.int64)
    for place, (loader, row) in enumerate(rows):
        loader.fill(row, input_ids[place], targets[place], positions[place], document_ids[place])
    arrays = (input_ids, targets, positions, document_ids)
    ids, shifted, places, documents = (torch.from_numpy(array) for array in arrays)
    return TokenBatch(input_ids=ids, targets=shifted, positions=places, document_ids=documents)


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
