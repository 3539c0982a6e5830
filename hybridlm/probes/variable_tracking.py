# SPDX-License-Identifier: Apache-2.0
"""Multi-hop tracing: variable tracking (Hsieh et al. 2024, "RULER", section 3; its code, variable_tracking.py)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.probes.bounds import fano
from hybridlm.probes.task import Examples, check_fits, log2_orders
from hybridlm.probes.text import BYTES, NOISE, Story, in_bytes

HAY = f"{NOISE}\n"
LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8).astype(np.int32)
NAME = 5
"""Letters of a variable."""
QUESTION = "\nVariables that are assigned the value {value}:"


@dataclass(frozen=True)
class VariableTracking:
    """Variables that get a number or the value of another, hidden in a row; asked are all that have one number.

        The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
        VAR QWERT = 54321
        The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
        VAR ABCDE = VAR QWERT
        ...
        Variables that are assigned the value 54321: QWERT ABCDE
                                                     ^^^^^ ^^^^^

    In bytes, each a token, or in the tokens of any tokenizer (`tokenised`); RULER's noise and statements, with a
    shorter question than its. The answer names the variables of a chain in their order; a model reads of it what stands
    before the letter that is asked, so that each name is one hop further from the number. Statements stand anywhere,
    those of a chain in order.
    """

    hops: int = 4
    """Variables of a chain behind the first."""
    chains: int = 1
    """Chains, each with a number of its own; one is asked."""

    is_text: ClassVar[bool] = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("hops", "chains"))
        most = 10_000  # of 90,000 numbers and 26^5 names, drawn until they differ
        require(self.chains * (self.hops + 1) <= most, f"chains ({self.chains}) * (hops ({self.hops}) + 1) must be at"
                f" most {most}")  # fmt: skip

    @property
    def vocab_size(self) -> int:
        """Bytes."""
        return BYTES

    @property
    def answers(self) -> np.ndarray:
        """The letters A to Z."""
        return LETTERS

    @property
    def letters(self) -> str:
        """A to Z."""
        return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

    @property
    def least(self) -> tuple[int, str]:
        """All statements, the question, and the answer but for its last letter."""
        statements = len("VAR ABCDE = 12345\n") + self.hops * len("VAR ABCDE = VAR QWERT\n")
        answer = len(QUESTION.format(value=12345)) + (self.hops + 1) * (NAME + 1)
        return self.chains * statements + answer - 1, f"chains ({self.chains}) and hops ({self.hops})"

    def check(self, length: int) -> None:
        """See `least`."""
        check_fits(length, *self.least)

    def batch(self, seed: int, step: int, rows: int, length: int) -> Examples:
        """Facet `hop`: how many hops from the number a variable is, from 0."""
        return in_bytes(self, seed, step, rows, length)

    def stories(self, rng: np.random.Generator, step: int, rows: int, size: int) -> list[Story]:
        """See `TextTask`."""
        return [self._story(rng) for _ in range(rows)]

    def chance(self, length: int) -> float:
        """1 / 26."""
        return 1 / len(LETTERS)

    def fixed_state(self, length: int, bits: float) -> float:
        """Fano's bound of the names of all chains, any of which may be asked: 5 chains (hops + 1) letters of
        n different names, log2(m (m - 1) ... (m - n + 1)) bits of m = 26 ** 5."""
        letters, entropy = self.askable(length)
        return fano(bits, letters, len(LETTERS), entropy)

    def askable(self, length: int) -> tuple[int, float]:
        """See `fixed_state`."""
        names = self.chains * (self.hops + 1)
        return NAME * names, log2_orders(len(LETTERS) ** NAME, names)

    def _story(self, rng: np.random.Generator) -> Story:
        per_chain = self.hops + 1
        names = [_spelled(name) for name in _different(rng, 0, len(LETTERS) ** NAME, self.chains * per_chain)]
        values = _different(rng, 10_000, 100_000, self.chains)
        pieces = []
        for chain, value in enumerate(values):
            shares = np.sort(rng.random(per_chain))
            of_chain = names[chain * per_chain : (chain + 1) * per_chain]
            sources = [str(value), *(f"VAR {name}" for name in of_chain[:-1])]
            lines = [f"VAR {name} = {source}\n" for name, source in zip(of_chain, sources, strict=True)]
            pieces += [(float(share), line) for share, line in zip(shares, lines, strict=True)]
        asked = int(rng.integers(self.chains))
        answer = "".join(f" {name}" for name in names[asked * per_chain : (asked + 1) * per_chain])
        asked_N = [letter != " " for letter in answer]  # not the space in front of a name
        hop_N = [i // (NAME + 1) for i in range(len(answer))]
        return Story(HAY, "\n", pieces, QUESTION.format(value=values[asked]) + answer, asked_N, {"hop": hop_N})


def _different(rng: np.random.Generator, low: int, high: int, n: int) -> list[int]:
    """n different numbers in the order in which they were drawn."""
    found: dict[int, None] = {}
    while len(found) < n:
        found |= dict.fromkeys(rng.integers(low, high, n - len(found)).tolist())
    return list(found)


def _spelled(number: int) -> str:
    """A number below 26 ** 5 as five letters."""
    return "".join(chr(LETTERS[number // len(LETTERS) ** i % len(LETTERS)]) for i in range(NAME))
