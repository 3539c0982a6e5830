# SPDX-License-Identifier: Apache-2.0
"""Documents cut into rows of fixed length, in closed form: any row is computed alone, from the seed and the data.

A document of n tokens is n - 1 pairs (token, next token). The documents are permuted by the seed, their pairs laid end
to end, and the stream is cut every `seq_len` pairs; row r is the r-th piece. A prefix sum over the permuted documents
finds the documents of a row by bisection, so no row depends on another, no state exists but an index, and every pair is
in exactly one row. A document that a cut divides goes on in the next row as a new segment from position 0.
"""

from typing import Protocol

import numpy as np

FIELDS = ("tokens", "targets", "segment_ids", "positions")


class Documents(Protocol):
    """Token ids of all documents in a row, and where each starts: document d is tokens[offsets[d]:offsets[d + 1]]."""

    tokens: np.ndarray
    offsets: np.ndarray


class PairRows:
    """Random access to the packed rows of one split.

    `rows[r]` is a dict of int32 [seq_len]: `tokens`; `targets`, the next token of the same document, -1 for padding;
    `segment_ids`, 1, 2, ... from left to right, 0 for padding; `positions`, 0, 1, ... within a segment. Only the last
    row is padded. Memory: 16 bytes a document.
    """

    def __init__(self, documents: Documents, seq_len: int, seed: int):
        if seq_len < 1:
            raise ValueError(f"seq_len ({seq_len}) must be at least 1")
        self.documents, self.seq_len, self.seed = documents, seq_len, seed
        n_pairs = np.diff(documents.offsets) - 1
        kept = np.flatnonzero(n_pairs > 0)
        order = kept[permutation_keys(kept, seed).argsort(kind="stable")]
        self._first_token = np.asarray(documents.offsets)[order]
        self._ends = np.cumsum(n_pairs[order])
        self.n_pairs = int(self._ends[-1]) if len(order) else 0

    def __reduce__(self):
        return PairRows, (self.documents, self.seq_len, self.seed)

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
        n = stop - start
        positions = np.arange(n) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        where = np.repeat(first_token, lengths) + positions
        cells = empty_row(self.seq_len)
        cells["tokens"][:n] = self.documents.tokens[where]
        cells["targets"][:n] = self.documents.tokens[where + 1]
        cells["segment_ids"][:n] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        cells["positions"][:n] = positions
        return cells


def empty_row(seq_len: int) -> dict[str, np.ndarray]:
    """A row of padding."""
    cells = {field: np.zeros(seq_len, np.int32) for field in FIELDS}
    cells["targets"] -= 1
    return cells


def permutation_keys(indices: np.ndarray, seed: int) -> np.ndarray:
    """uint64 keys whose order is a permutation: SplitMix64 (Steele et al. 2014) of index and seed.

    Written out, because NumPy's own permutations may change between its versions, and with them every batch.
    """
    keys = np.asarray(indices).astype(np.uint64) ^ _mix(np.full(1, seed % 2**64, np.uint64))
    return _mix(keys)


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
