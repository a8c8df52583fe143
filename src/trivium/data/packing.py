"""Several conversations in one row, none of which sees another: less of a batch is padding.

Which conversations share a row is fixed for a run; which rows share a batch is drawn anew every epoch (`RowLoader`).
Both are functions of the seed, so there is nothing to save or to lose.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import torch

from trivium.batches import IGNORE, TokenBatch
from trivium.data.collate import Row
from trivium.data.loader import RowLoader


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Return which items share a row of `capacity`: best fit decreasing, a function of lengths and seed.

    The longest item comes first, each goes into the fullest row that still has room for it, else into a new one. Among
    equally long items the order is drawn, so that equal seeds give equal rows and other seeds others. In the limit of
    many rows they are at most 11/9 of the fewest possible (Johnson et al. 1974, SIAM J. Comput. 3, 299). Raises
    ValueError for an item longer than a row. Worked, capacity 10: lengths 7, 5, 4, 3, 1 give rows (7, 3), (5, 4, 1).
    """
    if any(length > capacity for length in lengths):
        raise ValueError(f"an item of {max(lengths)} does not fit into a row of {capacity}")
    drawn = np.random.default_rng([seed, 0xB1]).permutation(len(lengths)).tolist()
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row), sorted: the fullest row that fits is the next one up
    for item in sorted(drawn, key=lambda index: -lengths[index]):
        place = bisect.bisect_left(rooms, (lengths[item], -1))
        if place == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(place)
        rows[row].append(item)
        bisect.insort(rooms, (room - lengths[item], row))
    return rows


def packed_length(row: Row) -> int:
    """Return the positions that a conversation takes in a packed row: its last token is predicted but never read."""
    return len(row[0]) - 1


def pack_rows(
    packs: Sequence[Sequence[Row]], pad_id: int, weights: Sequence[Sequence[Sequence[float]]] | None = None
) -> TokenBatch:
    """Return packs of conversations as rows of one TokenBatch [B, longest pack]; targets are shifted within each.

    Two conversations `<u> a <a> b <e>` and `<u> c <a> d <e>`, trained on the answers, and a pad::

        input_ids     <u>  a    <a>  b    <u>  c    <a>  d    <pad>
        targets       -100 -100 b    <e>  -100 -100 d    <e>  -100
        document_ids  0    0    0    0    1    1    1    1    -1
        positions     0    1    2    3    0    1    2    3    0

    No target crosses from one to the other, and attention stays within a document. `weights` are those of `pad_rows`,
    pack by pack.
    """
    width = max(sum(map(packed_length, pack)) for pack in packs)
    shape = (len(packs), width)
    ids, targets = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    # Pads form a document of their own, so attention within it is defined and touches nothing else.
    positions, documents = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    counts = np.zeros(shape, dtype=np.float32)
    for place, pack in enumerate(packs):
        at = 0
        for number, row in enumerate(pack):
            values, trained, count = np.asarray(row[0], dtype=np.int64), np.asarray(row[1], bool), packed_length(row)
            part = slice(at, at + count)
            ids[place, part] = values[:-1]
            targets[place, part] = np.where(trained[1:], values[1:], IGNORE)
            positions[place, part], documents[place, part] = np.arange(count), number
            if weights is not None:
                counts[place, part] = np.where(trained[1:], np.asarray(weights[place][number], np.float32)[1:], 0)
            at += count
    made = (torch.from_numpy(array) for array in (ids, targets, positions, documents))
    input_ids, shifted, places, document_ids = made
    return TokenBatch(
        input_ids=input_ids,
        targets=shifted,
        positions=places,
        document_ids=document_ids,
        weights=None if weights is None else torch.from_numpy(counts),
    )


def padding_frac(loader: RowLoader, lengths: Sequence[int]) -> float:
    """Return the share of padding in an epoch of batches whose rows have these lengths (the last batch may wrap)."""
    real = total = 0
    for step in range(loader.num_batches_per_epoch):
        row_lengths = [lengths[row] for row in loader.rows(step)]
        real += sum(row_lengths)
        total += max(row_lengths) * len(row_lengths)
    return 1 - real / total
