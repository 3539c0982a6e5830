# SPDX-License-Identifier: Apache-2.0
"""Selective copying (Gu and Dao 2023, "Mamba", section 3.1, appendix E.1; as S4's dataloaders/copying.py draws it)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.probes.bounds import fano
from hybridlm.probes.task import Examples, begin, check_fits, distinct, unscored

NOISE = 0


@dataclass(frozen=True)
class SelectiveCopying:
    """A few tokens, scattered among noise, are asked for in their order where the row ends in as many markers.

        . . a . . . b c . . . d . | | | |
                                  a b c d

    Noise is token 0, the marker the last of the vocabulary, what is remembered any between. The answers are not shown.
    A row of 4096 + 2 * 16 tokens is that of the paper: 4096 tokens of noise.
    """

    memorise: int = 16
    """Tokens to remember, and so markers."""
    vocab_size: int = 16
    """With noise and marker."""

    is_text: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("memorise",))
        require(self.vocab_size >= 3, f"vocab_size ({self.vocab_size}) must be at least 3: noise, marker and a token")

    @property
    def answers(self) -> np.ndarray:
        """All but noise and marker."""
        return np.arange(1, self.vocab_size - 1, dtype=np.int32)

    def check(self, length: int) -> None:
        """What is remembered, and as many markers."""
        check_fits(length, 2 * self.memorise, f"memorise ({self.memorise})")

    def batch(self, seed: int, step: int, rows: int, length: int) -> Examples:
        """Facet `place`: the how many-th of what is remembered, from 0."""
        rng = begin(self, seed, step, rows, length)
        n, marker = self.memorise, self.vocab_size - 1
        data_BN = rng.integers(1, marker, (rows, n), dtype=np.int32)
        at_BN = np.sort(distinct(rng, rows, 0, length - n, n), axis=1)
        tokens_BT, targets_BT = np.full((rows, length), NOISE, np.int32), unscored(rows, length)
        np.put_along_axis(tokens_BT, at_BN, data_BN, axis=1)
        tokens_BT[:, -n:], targets_BT[:, -n:] = marker, data_BN
        place_BT = np.zeros((rows, length), np.int32)
        place_BT[:, -n:] = np.arange(n)
        return Examples(tokens_BT, targets_BT, {"place": place_BT})

    def chance(self, length: int) -> float:
        """1 / (vocab_size - 2)."""
        return 1 / len(self.answers)

    def fixed_state(self, length: int, bits: float) -> float:
        """Fano's bound of n answers of log2(vocab_size - 2) bits each: those in the state at the first marker."""
        choices = len(self.answers)
        return fano(bits, self.memorise, choices, self.memorise * math.log2(choices))
