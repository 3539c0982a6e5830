# SPDX-License-Identifier: Apache-2.0
"""String copying (Jelassi et al. 2024, "Repeat After Me", section 3; its code, synthetic_exps/data_utils.py)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridlm.fields import check_fields, check_positive
from hybridlm.probes.bounds import fano, listed
from hybridlm.probes.task import Examples, at_power, begin, check_fits, unscored


@dataclass(frozen=True)
class StringCopying:
    """A string of random letters, then the same once more.

        $ a b c d | a b c d
                  a b c d

    Letters are tokens 0 .. letters - 1, behind them `$`, which begins a row, and `|`. The string is as long as the row
    allows: (length - 1) // 2 letters. Of the repetition a model reads what came before, as in the paper; the sign that
    ends it there is not asked here.
    """

    letters: int = 26
    """Different letters."""

    is_text: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("letters",))

    @property
    def vocab_size(self) -> int:
        """Letters, `$` and `|`."""
        return self.letters + 2

    @property
    def answers(self) -> np.ndarray:
        """The letters."""
        return np.arange(self.letters, dtype=np.int32)

    def check(self, length: int) -> None:
        """A string of one letter, and the two signs."""
        check_fits(length, 3, "a string of one letter")

    def batch(self, seed: int, step: int, rows: int, length: int) -> Examples:
        """Facet `place`: the how many-th letter, from 1, as the power of two not above it."""
        rng = begin(self, seed, step, rows, length)
        n = _letters_of(length)
        string_BN = rng.integers(0, self.letters, (rows, n), dtype=np.int32)
        begins_B1, ends_B1 = (np.full((rows, 1), self.letters + i, np.int32) for i in range(2))
        tokens_BT = np.concatenate([begins_B1, string_BN, ends_B1, string_BN], axis=1)[:, :length]
        targets_BT, place_BT = unscored(rows, length), np.zeros((rows, length), np.int32)
        asked = slice(n + 1, 2 * n + 1)
        targets_BT[:, asked], place_BT[:, asked] = string_BN, at_power(np.arange(1, n + 1))
        return Examples(tokens_BT, targets_BT, {"place": place_BT})

    def chance(self, length: int) -> float:
        """1 / letters."""
        return 1 / self.letters

    def fixed_state(self, length: int, bits: float) -> float:
        """The smaller of min(1, 2 ** bits / letters), of every letter, and Fano's bound of n letters of log2(letters)
        bits each: those in the state at `|`."""
        n = _letters_of(length)
        return min(listed(bits, self.letters), fano(bits, n, self.letters, n * math.log2(self.letters)))


def _letters_of(length: int) -> int:
    return (length - 1) // 2
