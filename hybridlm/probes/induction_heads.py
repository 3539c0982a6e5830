# SPDX-License-Identifier: Apache-2.0
"""Induction heads (Gu and Dao 2023, "Mamba", section 3.1 and appendix E.1, after Olsson et al. 2022)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridlm.errors import require
from hybridlm.fields import check_fields
from hybridlm.probes.bounds import listed
from hybridlm.probes.task import Examples, at_power, begin, check_fits, unscored


@dataclass(frozen=True)
class InductionHeads:
    """What stood behind the special token is asked where that comes again, at the end of the row.

        . . . * x . . . . . . . . *
                                  x

    The special token is the last of the vocabulary; all others are drawn alike. The paper trains at 256 tokens and
    tests up to 2 ** 20.
    """

    vocab_size: int = 16
    """With the special token."""

    is_text: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        require(self.vocab_size >= 2, f"vocab_size ({self.vocab_size}) must be at least 2: the special token, another")

    @property
    def answers(self) -> np.ndarray:
        """All but the special token."""
        return np.arange(self.vocab_size - 1, dtype=np.int32)

    def check(self, length: int) -> None:
        """The special token twice, and one between."""
        check_fits(length, 3, "the special token, the one behind it, and the special token again")

    def batch(self, seed: int, step: int, rows: int, length: int) -> Examples:
        """Facet `distance`: tokens from the first special token to the second, as the power of two not above it."""
        rng = begin(self, seed, step, rows, length)
        special = self.vocab_size - 1
        tokens_BT = rng.integers(0, special, (rows, length), dtype=np.int32)
        first_B1 = rng.integers(0, length - 2, (rows, 1))
        np.put_along_axis(tokens_BT, first_B1, special, axis=1)
        tokens_BT[:, -1] = special
        targets_BT = unscored(rows, length)
        targets_BT[:, -1:] = np.take_along_axis(tokens_BT, first_B1 + 1, axis=1)
        distance_BT = np.broadcast_to(at_power(length - 1 - first_B1), (rows, length))
        return Examples(tokens_BT, targets_BT, {"distance": distance_BT})

    def chance(self, length: int) -> float:
        """1 / (vocab_size - 1)."""
        return 1 / len(self.answers)

    def fixed_state(self, length: int, bits: float) -> float:
        """min(1, 2 ** bits / (vocab_size - 1)), which a model that remembers just this token reaches."""
        return listed(bits, len(self.answers))
