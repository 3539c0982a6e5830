# SPDX-License-Identifier: Apache-2.0
"""Documents cut into rows of fixed length, in closed form: any row is computed alone, from the seed and the data.

A document of n tokens is n - 1 pairs (token, next token). The documents are permuted by the seed, their pairs laid end
to end, and the stream is cut every `seq_len` pairs; row r is the r-th piece. A prefix sum over the permuted documents
finds the documents of a row by bisection, so no row depends on another, no state exists but an index, and every pair is
in exactly one row. A document that a cut divides goes on in the next row as a new segment from position 0.

`hybridlm.data.fitting` has the other packing, which divides only documents that no row holds.
"""

from pathlib import Path
from typing import Protocol

import numpy as np

from hybridlm.data.documents import Documents, Tokens
from hybridlm.data.order import Order, make_order, open_order, permutation_keys, whole_documents

__all__ = ["FIELDS", "PairRows", "Rows", "empty_row", "lay_out", "mapped_from", "permutation_keys", "reopen"]

FIELDS = ("tokens", "targets", "segment_ids", "positions")


class Rows(Protocol):
    """Random access to the packed rows of one split."""

    seq_len: int
    n_pairs: int
    """Targets in all rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """int32 [seq_len]: `tokens`; `targets`, the next token of the same document, -1 for padding; `segment_ids`, 1,
        2, ... from left to right, 0 for padding; `positions`, 0, 1, ... within a segment."""


class PairRows:
    """Rows of documents laid end to end and cut. Only the last row is padded. Memory: 16 bytes a document, which are
    mapped from `cache` where there are millions."""

    def __init__(
        self, documents: Documents, seq_len: int, seed: int, cache: Path | None = None, identity: str = "",
        order: Order | None = None,
    ):  # fmt: skip
        """cache: folder of large indices. identity: that of the documents, by which such an index is found again.
        order: the index, where it is there."""
        if seq_len < 1:
            raise ValueError(f"seq_len ({seq_len}) must be at least 1")
        self.documents, self.seq_len, self.seed = documents, seq_len, seed
        self._order = order or make_order(lambda: whole_documents(documents, seed), ["pairs", seed, identity], cache)
        self._first_token, self._ends = self._order.starts, self._order.ends
        self.n_pairs = int(self._ends[-1]) if len(self._ends) else 0

    def __reduce__(self):
        return reopen, (PairRows, self.documents, self.seq_len, self.seed, *mapped_from(self._order))

    def __len__(self) -> int:
        return -(-self.n_pairs // self.seq_len)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(f"row ({row}) not in 0..{len(self) - 1}")
        start = int(row) * self.seq_len
        stop = min(start + self.seq_len, self.n_pairs)
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        ends = self._ends[first : last + 1]
        starts = np.concatenate([[self._ends[first - 1] if first else 0], ends[:-1]])
        lengths = np.minimum(ends, stop) - np.maximum(starts, start)
        first_token = self._first_token[first : last + 1] + np.maximum(start - starts, 0)
        return lay_out(self.documents.reader, first_token, lengths, self.seq_len)


def mapped_from(order: Order) -> tuple[Path | None, np.ndarray | None]:
    """What `reopen` needs of an order to map it again; one in memory is made again."""
    return (None, None) if order.folder is None else (order.folder, order.counts)


def reopen(kind: type, documents: Documents, seq_len: int, seed: int, folder: Path | None, counts) -> Rows:
    """Rows in another process."""
    return kind(documents, seq_len, seed, order=None if folder is None else open_order(folder, counts))


def lay_out(tokens: Tokens, starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> dict[str, np.ndarray]:
    """A row of segments: of `lengths[s]` pairs from the token at `starts[s]` on, for each s; padding after them."""
    n, n_segments = int(lengths.sum()), len(lengths)
    segments = np.repeat(np.arange(n_segments), lengths)
    positions = np.arange(n) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    spans = lengths + 1  # a segment's tokens, and the one that its last pair ends with
    within = np.arange(n + n_segments) - np.repeat(np.cumsum(spans) - spans, spans)
    read = tokens[np.repeat(starts, spans) + within]
    cells = empty_row(seq_len)
    cells["tokens"][:n] = read[np.arange(n) + segments]
    cells["targets"][:n] = read[np.arange(n) + segments + 1]
    cells["segment_ids"][:n] = segments + 1
    cells["positions"][:n] = positions
    return cells


def empty_row(seq_len: int) -> dict[str, np.ndarray]:
    """A row of padding."""
    cells = {field: np.zeros(seq_len, np.int32) for field in FIELDS}
    cells["targets"] -= 1
    return cells
