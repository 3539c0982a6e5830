# SPDX-License-Identifier: Apache-2.0
"""Best-fit packing: documents stay whole wherever a row can hold them (Ding et al. 2024, "Fewer truncations improve
language modeling").

Documents are cut only where they are longer than a row. The pieces, the longest first, go each into the row with the
least room that still suffices. Which piece goes where depends on lengths alone, so the plan is made for classes of rows
that hold the same lengths and not for single documents: its size and time grow with seq_len and not with the corpus.
Pieces of one length are dealt out in an order drawn from the seed. Any row then follows from the plan and its number.
"""

import bisect
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybridlm.data.documents import Documents
from hybridlm.data.order import Order, make_order, pieces
from hybridlm.data.packing import check_sizes, lay_out, mapped_from, reopen


class Slot(NamedTuple):
    """What each row of a class holds of one length: row j of it has the pieces base + j * count + 0, 1, ... of them."""

    length: int
    count: int
    base: int


class Plan(NamedTuple):
    """Classes of rows: those of class c are rows [row_ends[c - 1], row_ends[c]), with slots [slot_ends[c - 1], ...)."""

    row_ends: np.ndarray
    slot_ends: np.ndarray
    slots: np.ndarray
    """int64 [slots, 3]: length, count, base of each."""


class FitRows:
    """Rows of whole documents, and of pieces of longer ones. Memory: 16 bytes a piece, which are read from `cache`
    where there are millions."""

    def __init__(
        self, documents: Documents, seq_len: int, seed: int, cache: Path | None = None, identity: str = "",
        order: Order | None = None, room: int = 0,
    ):  # fmt: skip
        """cache: folder of large indices. identity: that of the documents, by which such an index is found again.
        order: the index, where it is there. room: cells in front of each segment."""
        check_sizes(seq_len, room)
        self.documents, self.seq_len, self.seed, self.room = documents, seq_len, seed, room
        most = seq_len - room
        make = lambda: make_order(lambda: pieces(documents, seed, most), ["fit", most, seed, identity], cache)
        self._order = order = order or make()
        self._starts = order.starts
        self.n_pairs = int(order.ends[-1]) if len(order.ends) else 0
        counts = np.zeros(seq_len + 1, np.int64)  # by length, room included; the order has the longest first
        counts[seq_len - np.arange(len(order.counts))] = order.counts
        self._first_of_length = counts[::-1].cumsum()[::-1] - counts
        self._plan = best_fit(counts)

    def __reduce__(self):
        return reopen, (FitRows, self.documents, self.seq_len, self.seed, *mapped_from(self._order), self.room)

    def __len__(self) -> int:
        return int(self._plan.row_ends[-1]) if len(self._plan.row_ends) else 0

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(f"row ({row}) not in 0..{len(self) - 1}")
        plan = self._plan
        kind = int(np.searchsorted(plan.row_ends, row, side="right"))
        number = row - (int(plan.row_ends[kind - 1]) if kind else 0)
        slots = plan.slots[plan.slot_ends[kind - 1] if kind else 0 : plan.slot_ends[kind]]
        lengths, counts, bases = slots.T
        first = self._first_of_length[lengths] + bases + number * counts
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = self._starts[np.repeat(first, counts) + within]
        return lay_out(self.documents.reader, starts, np.repeat(lengths, counts) - self.room, self.seq_len, self.room)


def best_fit(counts: np.ndarray) -> Plan:
    """Rows for counts[n] pieces of n pairs; a row has len(counts) - 1.

    The same rows as by taking one piece after the other: those of one length fill a row of the least room until it has
    none for another, then the next row of that room.
    """
    seq_len = len(counts) - 1
    open_rows: dict[int, list[tuple[int, tuple[Slot, ...]]]] = {}  # room -> (number of rows, what each holds)
    rooms: list[int] = []  # with open rows, ascending
    done: list[tuple[int, tuple[Slot, ...]]] = []

    def put(room: int, n_rows: int, slots: tuple[Slot, ...]) -> None:
        if not n_rows:
            return
        if not room:
            done.append((n_rows, slots))
        elif room in open_rows:
            open_rows[room].append((n_rows, slots))
        else:
            open_rows[room] = [(n_rows, slots)]
            bisect.insort(rooms, room)

    for length in range(seq_len, 0, -1):
        left, base = int(counts[length]), 0
        while left:
            at = bisect.bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                n_rows, slots = open_rows[room].pop()
                if not open_rows[room]:
                    del open_rows[room], rooms[at]
            else:
                room, n_rows, slots = seq_len, left, ()  # as many new rows as could be needed
            each = room // length
            full = min(n_rows, left // each)
            put(room - each * length, full, (*slots, Slot(length, each, base)))
            left, base, used = left - full * each, base + full * each, full
            if left and left < each and used < n_rows:
                put(room - left * length, 1, (*_from_row(slots, used), Slot(length, left, base)))
                left, base, used = 0, base + left, used + 1
            if slots:
                put(room, n_rows - used, _from_row(slots, used))
    rows = done + [group for room in rooms for group in open_rows[room]]
    return Plan(
        np.cumsum([n_rows for n_rows, _ in rows], dtype=np.int64),
        np.cumsum([len(slots) for _, slots in rows], dtype=np.int64),
        np.array([slot for _, slots in rows for slot in slots], np.int64).reshape(-1, 3),
    )


def _from_row(slots: tuple[Slot, ...], row: int) -> tuple[Slot, ...]:
    """The slots of a class without its first rows."""
    return tuple(Slot(length, count, base + row * count) for length, count, base in slots)
