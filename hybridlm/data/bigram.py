# SPDX-License-Identifier: Apache-2.0
"""The byte-bigram baseline: what a model of pairs of neighbouring bytes pays per byte of validation text.

Each document is the symbol sequence [end] bytes [end], so that the model predicts the first byte and the end of a
document as a language model with bos and eos does; both figures then price the same events.
"""

from collections.abc import Sequence

import numpy as np

END = 256
SYMBOLS = 257
PIECE = 1 << 20


class BigramCounter:
    """Counts of (previous, next) symbols over documents."""

    def __init__(self):
        self.counts = np.zeros((SYMBOLS, SYMBOLS), np.int64)

    @property
    def n_bytes(self) -> int:
        """Bytes of the documents."""
        return int(self.counts[:, :END].sum())

    def add(self, texts: Sequence[str]) -> None:
        """Counts the pairs of a batch of documents, in pieces of bounded size."""
        low = 0
        while low < len(texts):
            high, characters = low, 0
            while high < len(texts) and characters < PIECE:
                characters += len(texts[high])
                high += 1
            self._add_pieces(texts[low:high])
            low = high

    def _add_pieces(self, texts: Sequence[str]) -> None:
        if len(texts) > 1 or len(texts[0]) <= PIECE:
            self._count([text.encode() for text in texts])
            return
        (text,), last = texts, END
        for start in range(0, len(text), PIECE):
            piece = np.frombuffer(text[start : start + PIECE].encode(), np.uint8)
            self._add_symbols(np.concatenate([[last], piece]).astype(np.int32))
            last = int(piece[-1])
        self._add_symbols(np.array([last, END], np.int32))

    def _count(self, documents: Sequence[bytes]) -> None:
        lengths = np.fromiter(map(len, documents), np.int64, len(documents)) + 1
        symbols = np.full(int(lengths.sum()) + 1, END, np.int32)
        is_byte = np.ones(len(symbols), bool)
        is_byte[0] = False
        is_byte[np.cumsum(lengths)] = False
        symbols[is_byte] = np.frombuffer(b"".join(documents), np.uint8)
        self._add_symbols(symbols)

    def _add_symbols(self, symbols: np.ndarray) -> None:
        pairs = symbols[:-1] * SYMBOLS + symbols[1:]
        self.counts += np.bincount(pairs, minlength=SYMBOLS * SYMBOLS).reshape(SYMBOLS, SYMBOLS)


def cross_entropy_bits(train: BigramCounter, held_out: BigramCounter) -> float | None:
    """Cross entropy of `held_out` under the add-one smoothed bigrams of `train`, bits per byte; None without bytes."""
    n_bytes = held_out.n_bytes
    if n_bytes == 0:
        return None
    seen = train.counts.astype(np.float64)
    log2_p = np.log2(seen + 1) - np.log2(seen.sum(axis=1, keepdims=True) + SYMBOLS)
    return float(-(held_out.counts * log2_p).sum() / n_bytes)
