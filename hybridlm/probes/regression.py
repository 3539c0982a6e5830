# SPDX-License-Identifier: Apache-2.0
"""In-context linear regression (Garg et al. 2022, "What Can Transformers Learn In-Context?", section 3), in tokens."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.probes.bounds import listed
from hybridlm.probes.task import UNSCORED, Examples, at_power, begin, check_fits, unscored


@dataclass(frozen=True)
class InContextRegression:
    """Inputs x and their y = w . x, of weights w that each row draws anew; y is asked before it is shown.

        x1 x1 x1 y1 x2 x2 x2 y2 x3 x3 x3 y3 ...
                          y2          y3

    The paper's numbers are real, and its models read and write real numbers. A language model reads tokens: real
    numbers would have to go into bins, and where bins meet no answer would be the right one. So all numbers are whole
    and small, each a token of its own: bins without loss, in which least squares is exact. Inputs are of -most_x ..
    most_x without 0, weights of -most_w .. most_w, all equally likely. Tokens: the inputs in their order, then the
    values of y.

    What is asked is determined: y of an x in the span of those before it, which mostly is every x after as many pairs
    as there are inputs.
    """

    inputs: int = 4
    """Numbers of an x, and weights."""
    most_x: int = 2
    """The largest input."""
    most_w: int = 2
    """The largest weight."""

    is_text: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("inputs", "most_x", "most_w"))
        size = (self.inputs * self.most_x**2) ** (self.inputs - 1)
        said = f"inputs ({self.inputs}) and most_x ({self.most_x}): (inputs most_x^2)^(inputs - 1) must be at most 10^8"
        require(size <= 10**8, said)

    @property
    def vocab_size(self) -> int:
        """Inputs, and values of y."""
        return 2 * self.most_x + 2 * self.most_y + 1

    @property
    def most_y(self) -> int:
        """The largest y."""
        return self.inputs * self.most_x * self.most_w

    @property
    def answers(self) -> np.ndarray:
        """The values of y, from the smallest."""
        return np.arange(2 * self.most_x, self.vocab_size, dtype=np.int32)

    def check(self, length: int) -> None:
        """A pair more than there are weights."""
        least = (self.inputs + 1) ** 2
        check_fits(length, least, f"inputs ({self.inputs}), whose weights are told by as many pairs,")

    def batch(self, seed: int, step: int, rows: int, length: int) -> Examples:
        """Facet `pairs`: pairs shown before, as the power of two not above it."""
        rng = begin(self, seed, step, rows, length)
        d, n = self.inputs, length // (self.inputs + 1) + 1  # the last pair may be cut
        sizes_BNd = rng.integers(1, self.most_x + 1, (rows, n, d))
        x_BNd = np.where(rng.random((rows, n, d)) < 0.5, -sizes_BNd, sizes_BNd)
        w_Bd = rng.integers(-self.most_w, self.most_w + 1, (rows, d))
        y_BN = np.einsum("BNd,Bd->BN", x_BNd, w_Bd)
        as_token = x_BNd + self.most_x - (x_BNd > 0)
        y_token = y_BN + self.most_y + 2 * self.most_x
        tokens_BT = np.concatenate([as_token, y_token[..., None]], axis=2).reshape(rows, -1)[:, :length]
        targets_BT, pairs_BT = unscored(rows, n * (d + 1)), np.zeros((rows, n * (d + 1)), np.int32)
        targets_BT[:, d - 1 :: d + 1] = np.where(_determined(x_BNd, self.most_x), y_token, UNSCORED)
        pairs_BT[:, d - 1 :: d + 1] = at_power(np.maximum(np.arange(n), 1))
        return Examples(tokens_BT.astype(np.int32), targets_BT[:, :length], {"pairs": pairs_BT[:, :length]})

    def chance(self, length: int) -> float:
        """1 / values of y, which are not equally likely: a guess of the likeliest, 0, is right more often."""
        return 1 / len(self.answers)

    def fixed_state(self, length: int, bits: float) -> float:
        """min(1, 2 ** bits / (2 most_w + 1)): of an x without zeros no y is likelier than one weight, and the state
        leads to at most 2 ** bits different answers."""
        return listed(bits, 2 * self.most_w + 1)


def _determined(x_BNd: np.ndarray, most: int) -> np.ndarray:
    """bool [B, N]: whether x lies in the span of those before it, by an orthonormal basis that grows (Gram-Schmidt).

    What of a whole-numbered x lies outside of the span of others has a square of at least 1 / (d most^2)^(d - 1), as
    the quotient of two determinants of whole numbers; half of it is far above what float64 loses.
    """
    rows, n, d = x_BNd.shape
    least = 0.5 / float(d * most**2) ** (d - 1)
    inside_BN, basis_Bdd, rank_B = np.ones((rows, n), bool), np.zeros((rows, d, d)), np.zeros(rows, int)
    for i in range(n):
        if (rank_B == d).all():
            break
        rest_Bd = x_BNd[:, i].astype(np.float64)
        for _ in range(2):  # the second pass takes off what rounding left
            rest_Bd = rest_Bd - np.einsum("Bkd,Bk->Bd", basis_Bdd, np.einsum("Bkd,Bd->Bk", basis_Bdd, rest_Bd))
        square_B = (rest_Bd**2).sum(axis=1)
        new = np.flatnonzero((square_B > least) & (rank_B < d))
        basis_Bdd[new, rank_B[new]] = rest_Bd[new] / np.sqrt(square_B[new])[:, None]
        rank_B[new] += 1
        inside_BN[new, i] = False
    return inside_BN
