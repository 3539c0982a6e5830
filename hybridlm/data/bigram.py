# SPDX-License-Identifier: Apache-2.0
"""The byte-bigram baseline: what a model of pairs of neighbouring bytes pays per byte of validation text.

Each document is the symbol sequence [end] bytes [end], so that the model predicts the first byte and the end of a
document as a language model with bos and eos does; both figures then price the same events.
"""

from collections.abc import Sequence

import numpy as np

END = 256
SYMBOLS = 257


class BigramCounter:
    """Counts of (previous, next) symbols over documents."""

    def __init__(self):
        self.counts = np.zeros((SYMBOLS, SYMBOLS), np.int64)

    def add(self, documents: Sequence[bytes]) -> None:
        """Counts the pairs of a batch of documents."""
        if not documents:
            return
        lengths = np.fromiter(map(len, documents), np.int64, len(documents)) + 1
        symbols = np.full(int(lengths.sum()) + 1, END, np.int32)
        is_byte = np.ones(len(symbols), bool)
        is_byte[0] = False
        is_byte[np.cumsum(lengths)] = False
        symbols[is_byte] = np.frombuffer(b"".join(documents), np.uint8)
        pairs = symbols[:-1] * SYMBOLS + symbols[1:]
        self.counts += np.bincount(pairs, minlength=SYMBOLS * SYMBOLS).reshape(SYMBOLS, SYMBOLS)


def cross_entropy_bits(train: BigramCounter, held_out: BigramCounter) -> float | None:
    """Cross entropy of `held_out` under the add-one smoothed bigrams of `train`, bits per byte; None without bytes."""
    n_bytes = int(held_out.counts[:, :END].sum())
    if n_bytes == 0:
        return None
    seen = train.counts.astype(np.float64)
    log2_p = np.log2(seen + 1) - np.log2(seen.sum(axis=1, keepdims=True) + SYMBOLS)
    return float(-(held_out.counts * log2_p).sum() / n_bytes)
