# SPDX-License-Identifier: Apache-2.0
"""Needle in a haystack, one key or many (Kamradt 2023; Hsieh et al. 2024, "RULER", section 3, S-NIAH and MK-NIAH)."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.probes.bounds import fano
from hybridlm.probes.task import Examples, begin, check_fits, distinct
from hybridlm.probes.text import BYTES, DIGITS, KEYS, NOISE, Story, ending, hide, in_bytes, longest, number

HAY = f"{NOISE} "
NEEDLE = "One of the special magic numbers for {key} is: {value}. "
QUESTION = "\nThe special magic number for {key} mentioned in the provided text is {value}"
HIDE, ASK = 0, 1


@dataclass(frozen=True)
class Needle:
    """Keys with numbers, hidden in a row; the number of one key is asked at its end.

        ... Here we go. There and back again. One of the special magic numbers for keen-valley is: 4071936. The grass is
        green. The sky is blue. ...
        The special magic number for keen-valley mentioned in the provided text is 4071936
                                                                                   ^^^^^^^

    `bytes` is RULER's text in bytes (its noise, its needle, the beginning of its answer; not its instruction, and words
    of a list of our own), and in the tokens of any tokenizer (`tokenised`). `tokens` is the same without a language,
    for small models: the needle is [0, key, value ...], the question [1, key]; keys, values and hay are a third each of
    the other tokens, all drawn alike. Of the number a model reads the digits before the one that is asked.

    The needle that is asked stands at each depth of `depths` in turn, row by row; the others at any of these depths.
    With several lengths that is the grid of depth and length: see `scoring.heat_map`.
    """

    needles: int = 1
    """Keys; all but one are there to be told from it (multi-key)."""
    over: Literal["bytes", "tokens"] = "bytes"
    """Text, or tokens without a language."""
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    """How deep needles stand, in percent of the hay, at the nearest beginning of a sentence; of tokens anywhere."""
    digits: int = 7
    """Tokens of a number; of bytes the first is no 0."""
    tokens: int = 512
    """Size of the vocabulary of `tokens`."""

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("needles", "digits"))
        require(bool(self.depths) and all(0 <= depth <= 100 for depth in self.depths),
                f"depths ({self.depths}) must be percents, 0 to 100, at least one")  # fmt: skip
        require(self.tokens >= 5, f"tokens ({self.tokens}) must be at least 5: two signs, a key, a value and hay")
        keys = len(KEYS) if self.is_text else self._third
        require(self.needles <= keys, f"needles ({self.needles}) above the {keys} keys that there are")

    @property
    def is_text(self) -> bool:
        """Of bytes."""
        return self.over == "bytes"

    @property
    def vocab_size(self) -> int:
        """Bytes, or `tokens`."""
        return BYTES if self.is_text else self.tokens

    @property
    def answers(self) -> np.ndarray:
        """The digits, or all values."""
        if self.is_text:
            return DIGITS
        return np.arange(2 + self._third, 2 + 2 * self._third, dtype=np.int32)

    @property
    def letters(self) -> str:
        """The digits."""
        return "0123456789"

    @property
    def least(self) -> tuple[int, str]:
        """All needles, with the longest keys, and the question; the last digit is not read."""
        if self.is_text:
            sizes = [len(text.format(key="", value="")) + longest(KEYS) + self.digits for text in (NEEDLE, QUESTION)]
        else:
            sizes = [2 + self.digits, 2 + self.digits]
        return self.needles * sizes[0] + sizes[1] - 1, f"needles ({self.needles}) and digits ({self.digits})"

    def check(self, length: int) -> None:
        """See `least`."""
        check_fits(length, *self.least)

    def batch(self, seed: int, step: int, rows: int, length: int) -> Examples:
        """Facet `depth`: of the needle that is asked, in percent."""
        if self.is_text:
            return in_bytes(self, seed, step, rows, length)
        rng = begin(self, seed, step, rows, length)
        found, depth_B1 = [], np.zeros((rows, 1), np.int32)
        keys_BN = distinct(rng, rows, 0, self._third, self.needles)
        for row in range(rows):
            depths = self._depths(rng, step * rows + row)
            needles, question = self._of_tokens(rng, keys_BN[row])
            size = length + 1 - sum(map(len, needles)) - len(question)
            hay = rng.integers(2 + 2 * self._third, self.tokens, size).tolist()
            pieces = [(depths[i] / 100, needles[i]) for i in rng.permutation(self.needles)]
            found.append([*hide(hay, range(size + 1), pieces), *question])
            depth_B1[row] = depths[0]
        return ending(found, np.ones(self.digits, bool), {"depth": depth_B1})

    def stories(self, rng: np.random.Generator, step: int, rows: int, size: int) -> list[Story]:
        """See `TextTask`."""
        found = []
        keys_BN = distinct(rng, rows, 0, len(KEYS), self.needles)
        for row in range(rows):
            depths = self._depths(rng, step * rows + row)
            said = [{"key": KEYS[key], "value": number(rng, "123456789", self.digits)} for key in keys_BN[row]]
            pieces = [(depths[i] / 100, NEEDLE.format(**said[i])) for i in rng.permutation(self.needles)]
            facets = {"depth": [depths[0]] * self.digits}
            found.append(Story(HAY, ". ", pieces, QUESTION.format(**said[0]), [True] * self.digits, facets))
        return found

    def chance(self, length: int) -> float:
        """1 / 10, or 1 / values."""
        return 1 / len(self.answers)

    def fixed_state(self, length: int, bits: float) -> float:
        """Fano's bound of the numbers of all keys, any of which may be asked: of bytes log2(9) + (digits - 1) log2(10)
        bits each, of v values digits log2(v)."""
        letters, entropy = self.askable(length)
        return fano(bits, letters, len(self.answers), entropy)

    def askable(self, length: int) -> tuple[int, float]:
        """See `fixed_state`."""
        lost = math.log2(10 / 9) if self.is_text else 0.0
        bits = self.digits * math.log2(len(self.answers)) - lost
        return self.needles * self.digits, self.needles * bits

    @property
    def _third(self) -> int:
        return (self.tokens - 2) // 3

    def _depths(self, rng: np.random.Generator, row: int) -> list[int]:
        """Of each needle of a row, that which is asked first."""
        depths = [self.depths[row % len(self.depths)]]
        return depths + [int(depth) for depth in rng.choice(self.depths, self.needles - 1)]

    def _of_tokens(self, rng: np.random.Generator, keys) -> tuple[list[list[int]], list[int]]:
        values = rng.choice(self.answers, (self.needles, self.digits))
        needles = [[HIDE, 2 + int(key), *map(int, value)] for key, value in zip(keys, values, strict=True)]
        return needles, [ASK, *needles[0][1:]]
