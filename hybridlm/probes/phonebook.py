# SPDX-License-Identifier: Apache-2.0
"""Phonebook lookup (Jelassi et al. 2024, "Repeat After Me", section 4; its code, pretrained_exps/data_utils.py)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.probes.bounds import fano
from hybridlm.probes.task import Examples, check_fits, distinct
from hybridlm.probes.text import BYTES, DIGITS, NAMES, Story, in_bytes, longest, number

NUMBER = 10
"""Digits of a number; the first is one of 6 to 9."""
LINE = longest(NAMES) + len(": ") + NUMBER
BITS = 2 + (NUMBER - 1) * math.log2(10)
"""Of a number."""


@dataclass(frozen=True)
class Phonebook:
    """Names with their numbers, two of them once more as examples, then a third name, whose number is asked.

        Zoe Weber: 7012345678
        Igor Khan: 9176543210
        Ada Xu: 6000123456
        Carl Ueda: 8234567890

        Igor Khan: 9176543210
        Carl Ueda: 8234567890

        Ada Xu: 6000123456
                ^^^^^^^^^^

    In bytes, each a token, or in the tokens of any tokenizer (`tokenised`). Of the number a model reads the digits
    before the one that is asked. Names are of 32 first and 32 last ones (the paper's are of a package with more), no
    name twice. Line ends in front fill a row up.
    """

    entries: int | None = None
    """Names; None: as many as always fit the row."""

    is_text: ClassVar[bool] = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("entries",))
        if self.entries is not None:
            said = f"entries ({self.entries}) must be at least 3, two of them examples, and at most {len(NAMES)}"
            require(3 <= self.entries <= len(NAMES), said)

    @property
    def vocab_size(self) -> int:
        """Bytes."""
        return BYTES

    @property
    def answers(self) -> np.ndarray:
        """The digits."""
        return DIGITS

    @property
    def letters(self) -> str:
        """The digits."""
        return "0123456789"

    @property
    def least(self) -> tuple[int, str]:
        """Names of the longest, in the book and in what follows it."""
        entries = self.entries or 3
        return _size(entries), f"{entries} entries"

    def check(self, length: int) -> None:
        """See `least`."""
        check_fits(length, *self.least)

    def batch(self, seed: int, step: int, rows: int, length: int) -> Examples:
        """Facets `entries`, and `depth`: where in the book the name stands, in tens of percents."""
        return in_bytes(self, seed, step, rows, length)

    def stories(self, rng: np.random.Generator, step: int, rows: int, size: int) -> list[Story]:
        """See `TextTask`."""
        n = self._entries(size - 1)
        found = []
        for names in distinct(rng, rows, 0, len(NAMES), n):
            lines = [f"{NAMES[name]}: {number(rng, '6789', NUMBER)}" for name in names]
            first, second, asked = rng.permutation(n)[:3]
            text = "\n".join(lines) + f"\n\n{lines[first]}\n{lines[second]}\n\n{lines[asked]}"
            facets = {"entries": [n] * NUMBER, "depth": [10 * (10 * int(asked) // n)] * NUMBER}
            found.append(Story("\n", "\n", (), text, [True] * NUMBER, facets))
        return found

    def chance(self, length: int) -> float:
        """1 / 10."""
        return 1 / len(DIGITS)

    def fixed_state(self, length: int, bits: float) -> float:
        """Fano's bound of all numbers that may be asked, those of the examples not among them: 10 (entries - 2) digits,
        2 + 9 log2(10) bits a number."""
        letters, entropy = self.askable(length)
        return fano(bits, letters, len(DIGITS), entropy)

    def askable(self, length: int) -> tuple[int, float]:
        """See `fixed_state`."""
        n = self._entries(length) - 2
        return n * NUMBER, n * BITS

    def _entries(self, length: int) -> int:
        least, more = _size(0), _size(1) - _size(0)
        return self.entries or min((length - least) // more, len(NAMES))


def _size(entries: int) -> int:
    """Tokens of a row, all names the longest; the last digit is not read."""
    return entries * (LINE + len("\n")) + len("\n") + 2 * (LINE + len("\n")) + len("\n") + LINE - 1
