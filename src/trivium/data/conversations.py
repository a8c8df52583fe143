"""Rendered conversations as training batches: one to a row, or packed, with what each token counts for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trivium.batches import TokenBatch
from trivium.data.chat import Rendered
from trivium.data.collate import Row, pad_rows
from trivium.data.loader import RowLoader
from trivium.data.packing import pack, pack_rows, packed_length, padding_frac


@dataclass(frozen=True, kw_only=True)
class Side:
    """Conversations to train on, or held out: ids with what is trained of them, and what each token then counts for.

    `weights` is None where every trained token counts for 1.
    """

    rows: list[Row]
    weights: list[list[float]] | None = None

    @classmethod
    def of(cls, rendered: Sequence[Rendered]) -> Side:
        """Return rendered conversations as a side."""
        weighted = any(weight not in (0, 1) for each in rendered for weight in set(each.weights))
        weights = [each.weights for each in rendered] if weighted else None
        return cls(rows=[(each.input_ids, each.trained) for each in rendered], weights=weights)

    def __len__(self) -> int:
        """Return how many conversations there are."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        """Return the conversations, each as ids with what is trained of them."""
        return iter(self.rows)

    def batch(self, chosen: Sequence[int], pad_id: int) -> TokenBatch:
        """Return some of the conversations as a padded batch, one to a row."""
        weights = None if self.weights is None else [self.weights[row] for row in chosen]
        return pad_rows([self.rows[row] for row in chosen], pad_id, weights)

    def packed(self, packs: Sequence[Sequence[int]], pad_id: int) -> TokenBatch:
        """Return packs of the conversations as a batch, one pack to a row."""
        weights = None if self.weights is None else [[self.weights[i] for i in each] for each in packs]
        return pack_rows([[self.rows[i] for i in each] for each in packs], pad_id, weights)


class Deal:
    """Which conversations stand in which rows of which step's batch: a pure function of seed and step."""

    def __init__(
        self, side: Side, batch_size: int, seed: int, pad_id: int, *, context: int = 0, numbered: bool = False
    ) -> None:
        """Prepare; `batch_size` counts rows over all ranks.

        With a `context` conversations are packed into rows of so many tokens, else each is a row, and similar lengths
        come together. `numbered` batches know the numbers of their rows in the run.
        """
        self.side, self.batch_size, self.pad_id, self.numbered = side, batch_size, pad_id, numbered
        lengths = [len(ids) for ids, _ in side.rows]
        self.loader = RowLoader(len(lengths), batch_size, seed, lengths=lengths)
        self.packs: list[list[int]] = []
        self._facts: dict[str, Any] = {}
        if context:
            places = [packed_length(row) for row in side.rows]
            unpacked = padding_frac(self.loader, lengths)
            self.packs = pack(places, context, seed)
            self.loader = RowLoader(len(self.packs), batch_size, seed)
            packed = padding_frac(self.loader, [sum(places[row] for row in each) for each in self.packs])
            shares = {"padding_frac": packed, "padding_frac_unpacked": unpacked}
            self._facts = {"packing": {"rows": len(self.packs), **shares}}

    def batch(self, step: int, rank: int = 0, size: int = 1) -> TokenBatch:
        """Return one rank's part of the batch at `step`."""
        chosen = self.loader.rows(step, rank, size)
        if self.packs:
            batch = self.side.packed([self.packs[row] for row in chosen], self.pad_id)
        else:
            batch = self.side.batch(chosen, self.pad_id)
        if not self.numbered:
            return batch
        numbers = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)[rank::size]
        return dataclasses.replace(batch, row_numbers=numbers)

    def facts(self) -> dict[str, Any]:
        """Return what a manifest says of packing: rows in an epoch, and the share of padding with and without."""
        return self._facts
