# SPDX-License-Identifier: Apache-2.0
"""Multi-query associative recall (Arora et al. 2023, "Zoology"; its code, zoology/data/multiquery_ar.py)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.probes.bounds import fano
from hybridlm.probes.task import Examples, at_power, begin, check_fits, distinct, log2_orders, unscored


@dataclass(frozen=True)
class MQAR:
    """Pairs of a key and its value, then every key once more, at which its value is asked.

        k1 v1 k2 v2 k3 v3 . . k2 . k1 . . . . . k3 .
                              v2   v1           v3

    Keys are tokens 1 .. vocab_size // 2 - 1, values the upper half; of a row all differ. Queries stand at even
    distances behind the pairs. How far is drawn by a power law, as far as bigrams come back in text: the first place
    has weight 1, the j-th j ** (power - 1); each place is taken once. What lies between is filler.
    """

    pairs: int = 8
    """Pairs of a row, and so queries."""
    vocab_size: int = 8192
    """Half of it keys, half values."""
    power: float = 0.01
    """Of the law of distances; 1: every place is as likely."""
    random_filler: bool = True
    """Filler is any token of the vocabulary, keys and values among them; else token 0."""

    is_text: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("pairs", "power"))
        keys = self.vocab_size // 2 - 1
        require(self.pairs <= keys, f"pairs ({self.pairs}) above the {keys} keys of vocab_size ({self.vocab_size})")

    @property
    def answers(self) -> np.ndarray:
        """The values."""
        return np.arange(self.vocab_size // 2, self.vocab_size, dtype=np.int32)

    def check(self, length: int) -> None:
        """Two tokens a pair, and two a query."""
        check_fits(length, 4 * self.pairs, f"pairs ({self.pairs})")

    def batch(self, seed: int, step: int, rows: int, length: int) -> Examples:
        """Facet `distance`: tokens from the key to its query, as the power of two not above it."""
        rng = begin(self, seed, step, rows, length)
        n, half = self.pairs, self.vocab_size // 2
        keys_BN = distinct(rng, rows, 1, half, n)
        values_BN = distinct(rng, rows, half, self.vocab_size, n)
        places = (length - 2 * n) // 2
        weights = np.arange(1, places + 1) ** (self.power - 1.0)
        # places in the order in which clocks of these rates ring: drawn one after the other without replacement
        ring = rng.exponential(size=(rows, places)) / weights
        at_BN = 2 * n + 2 * ring.argsort(axis=1)[:, :n]
        if self.random_filler:
            tokens_BT = rng.integers(0, self.vocab_size, (rows, length), dtype=np.int32)
        else:
            tokens_BT = np.zeros((rows, length), np.int32)
        tokens_BT[:, 0 : 2 * n : 2], tokens_BT[:, 1 : 2 * n : 2] = keys_BN, values_BN
        targets_BT, distance_BT = unscored(rows, length), np.zeros((rows, length), np.int32)
        np.put_along_axis(tokens_BT, at_BN, keys_BN, axis=1)
        np.put_along_axis(targets_BT, at_BN, values_BN, axis=1)
        np.put_along_axis(distance_BT, at_BN, at_power(at_BN - 2 * np.arange(n)), axis=1)
        return Examples(tokens_BT, targets_BT, {"distance": distance_BT})

    def chance(self, length: int) -> float:
        """1 / values."""
        return 1 / len(self.answers)

    def fixed_state(self, length: int, bits: float) -> float:
        """Fano's bound of all values of a row, n different ones of v: log2(v (v - 1) ... (v - n + 1)) bits."""
        values = len(self.answers)
        return fano(bits, self.pairs, values, log2_orders(values, self.pairs))
