# SPDX-License-Identifier: Apache-2.0
"""Documents cut into rows of fixed length, in closed form: any row is computed alone, from the seed and the data.

A document of n tokens is n - 1 pairs (token, next token). The documents are permuted by the seed, their pairs laid end
to end, and the stream is cut every `seq_len` pairs; row r is the r-th piece. A prefix sum over the permuted documents
finds the documents of a row by bisection, so no row depends on another, no state exists but an index, and every pair is
in exactly one row. A document that a cut divides goes on in the next row as a new segment from position 0.

`hybridlm.data.fitting` has the other packing, which divides only documents that no row holds.

A model with prefix tokens needs room for them in front of each segment. A document then is `room` cells longer in the
stream, which is cut every `seq_len - room` cells: the room of the segment that begins a row is that row's own.
"""

import bisect
from pathlib import Path
from typing import Protocol

import numpy as np

from hybridlm.data.documents import READ_ONLY, Documents, Tokens
from hybridlm.data.order import Order, make_order, open_order, permutation_keys, whole_documents
from hybridlm.errors import require

__all__ = ["FIELDS", "PairRows", "Rows", "empty_row", "lay_out", "mapped_from", "permutation_keys", "reopen"]

FIELDS = ("tokens", "targets", "segment_ids", "positions")


class Rows(Protocol):
    """Random access to the packed rows of one split."""

    seq_len: int
    n_pairs: int
    """Pairs of a token and the next one in all rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """int32 [seq_len]: `tokens`; `targets`, the next token of the same document, -1 for padding, for the room in
        front of a segment and for a token that is not trained on; `segment_ids`, 1, 2, ... from left to right, 0 for
        padding; `positions`, 0, 1, ... within a segment, its room included."""


class PairRows:
    """Rows of documents laid end to end and cut. Only the last row is padded. Memory: 16 bytes a document, which are
    read from `cache` where there are millions."""

    def __init__(
        self, documents: Documents, seq_len: int, seed: int, cache: Path | None = None, identity: str = "",
        order: Order | None = None, room: int = 0,
    ):  # fmt: skip
        """cache: folder of large indices. identity: that of the documents, by which such an index is found again.
        order: the index, where it is there. room: cells in front of each segment."""
        check_sizes(seq_len, room)
        self.documents, self.seq_len, self.seed, self.room = documents, seq_len, seed, room
        self._order = order or make_order(lambda: whole_documents(documents, seed), ["pairs", seed, identity], cache)
        self._first_token, self._ends = self._order.starts, self._order.ends
        self.n_pairs = int(self._ends[-1]) if len(self._ends) else 0

    def __reduce__(self):
        return reopen, (PairRows, self.documents, self.seq_len, self.seed, *mapped_from(self._order), self.room)

    def __len__(self) -> int:
        return -(-self._end(len(self._ends) - 1) // (self.seq_len - self.room))

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(f"row ({row}) not in 0..{len(self) - 1}")
        start = int(row) * (self.seq_len - self.room)
        stop = min(start + self.seq_len - self.room, self._end(len(self._ends) - 1))
        documents = range(len(self._ends))
        first = bisect.bisect_right(documents, start, key=self._end)
        last = bisect.bisect_left(documents, stop, key=self._end)
        ends = self._ends[first : last + 1] + self.room * np.arange(first + 1, last + 2)
        starts = np.concatenate([[self._end(first - 1)], ends[:-1]]) + self.room  # of the pairs
        lengths = np.minimum(ends, stop) - np.maximum(starts, start)
        first_token = self._first_token[first : last + 1] + np.maximum(start - starts, 0)
        has_pairs = lengths > 0  # not a document of which the row has room alone: the next one begins it
        return lay_out(self.documents.reader, first_token[has_pairs], lengths[has_pairs], self.seq_len, self.room)

    def _end(self, document: int) -> int:
        """Cells of the stream up to the end of a document."""
        return int(self._ends[document]) + self.room * (document + 1) if document >= 0 else 0


def check_sizes(seq_len: int, room: int) -> None:
    """ValueError, ConfigError: for rows that hold nothing."""
    if seq_len < 1:
        raise ValueError(f"seq_len ({seq_len}) must be at least 1")
    require(
        0 <= room < seq_len,
        f"data.seq_len ({seq_len}) must be above model.prefix_tokens ({room}), which stand before each document",
    )


def mapped_from(order: Order) -> tuple[Path | None, np.ndarray | None]:
    """What `reopen` needs of an order to open it again; one in memory is made again."""
    return (None, None) if order.folder is None else (order.folder, order.counts)


def reopen(kind: type, documents: Documents, seq_len: int, seed: int, folder: Path | None, counts, room: int) -> Rows:
    """Rows in another process."""
    order = None if folder is None else open_order(folder, counts)
    return kind(documents, seq_len, seed, order=order, room=room)


def lay_out(
    tokens: Tokens, starts: np.ndarray, lengths: np.ndarray, seq_len: int, room: int = 0
) -> dict[str, np.ndarray]:
    """A row of segments: of `lengths[s]` pairs from the token at `starts[s]` on, for each s; padding after them.

    room: cells in front of each, of its segment, without a target.
    """
    n, n_segments = int(lengths.sum()), len(lengths)
    if room:
        packed = lay_out(tokens, starts, lengths, n)
        spans = lengths + room
        number = np.repeat(np.arange(n_segments), spans)
        position = np.arange(n + room * n_segments) - np.repeat(np.cumsum(spans) - spans, spans)
        cells = empty_row(seq_len)
        of_pair = np.flatnonzero(position >= room)
        cells["tokens"][of_pair], cells["targets"][of_pair] = packed["tokens"], packed["targets"]
        cells["segment_ids"][: len(number)], cells["positions"][: len(number)] = number + 1, position
        return cells
    segments = np.repeat(np.arange(n_segments), lengths)
    positions = np.arange(n) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    spans = lengths + 1  # a segment's tokens, and the one that its last pair ends with
    within = np.arange(n + n_segments) - np.repeat(np.cumsum(spans) - spans, spans)
    read = tokens[np.repeat(starts, spans) + within]
    ids, predicted = _unmarked(read)
    of_target = np.arange(n) + segments + 1
    cells = empty_row(seq_len)
    cells["tokens"][:n] = ids[of_target - 1]
    cells["targets"][:n] = np.where(predicted[of_target], ids[of_target], -1)
    cells["segment_ids"][:n] = segments + 1
    cells["positions"][:n] = positions
    return cells


def _unmarked(read: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int32 ids, whether each is trained on)."""
    if read.dtype.itemsize < 4 or read.dtype == np.int32:  # these have no room for the mark
        return read.astype(np.int32), np.ones(len(read), bool)
    return (read & (READ_ONLY - 1)).astype(np.int32), (read & READ_ONLY) == 0


def empty_row(seq_len: int) -> dict[str, np.ndarray]:
    """A row of padding."""
    cells = {field: np.zeros(seq_len, np.int32) for field in FIELDS}
    cells["targets"] -= 1
    return cells
