# SPDX-License-Identifier: Apache-2.0
"""State tracking: the word problem of a group (Merrill et al. 2024, "The Illusion of State"; Liu et al. 2023)."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from hybridlm.fields import check_fields
from hybridlm.probes.bounds import check_bits, listed
from hybridlm.probes.task import Examples, at_power, begin, check_fits


@dataclass(frozen=True)
class StateTracking:
    """Elements of a group, and behind each the product of all so far: g1, g1 g2, g1 g2 g3, ...

        g1  g2     g3       g4
        g1  g1 g2  g1 g2 g3 ...

    Z2 is parity (the sum of bits so far, modulo 2), which one bit of state solves; Z60, A4xZ5 and A5 are the paper's
    three of 60 elements, of which A5 cannot be solved by a model of constant depth whose state moves by diagonal
    matrices (unless TC0 is NC1); S5 are all orders of five things. An element of a symmetric group is a permutation, by
    its number among all in lexical order, and a b is first a, then b: i -> b(a(i)). Of A4xZ5 it is 5 a + z.
    """

    group: Literal["Z2", "Z60", "S3", "A4xZ5", "A5", "S5"] = "S5"
    """Whose words."""

    is_text: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)

    @property
    def vocab_size(self) -> int:
        """Elements of the group."""
        return len(products(self.group))

    @property
    def answers(self) -> np.ndarray:
        """All elements."""
        return np.arange(self.vocab_size, dtype=np.int32)

    def check(self, length: int) -> None:
        """Any word will do."""
        check_fits(length, 1, "a word of one element")

    def batch(self, seed: int, step: int, rows: int, length: int) -> Examples:
        """Facet `place`: elements so far, as the power of two not above it."""
        rng = begin(self, seed, step, rows, length)
        table = products(self.group)
        tokens_BT = rng.integers(0, len(table), (rows, length), dtype=np.int32)
        targets_BT = tokens_BT.copy()
        for t in range(1, length):
            targets_BT[:, t] = table[targets_BT[:, t - 1], tokens_BT[:, t]]
        place_BT = np.broadcast_to(at_power(np.arange(1, length + 1)), (rows, length))
        return Examples(tokens_BT, targets_BT, {"place": place_BT})

    def chance(self, length: int) -> float:
        """1 / elements."""
        return 1 / self.vocab_size

    def fixed_state(self, length: int, bits: float) -> float:
        """(1 + (length - 1) min(1, 2 ** bits / elements)) / length: the first product is its element; of every other
        the state has to say the one before, which is any of the group, whatever the element at hand."""
        check_bits(bits)
        return (1 + (length - 1) * listed(bits, self.vocab_size)) / length


@functools.cache
def products(group: str) -> np.ndarray:
    """int32 [n, n]: the number of the product of two elements of a group, by their numbers."""
    return GROUPS[group]()


def _cyclic(n: int) -> np.ndarray:
    i = np.arange(n, dtype=np.int32)
    return (i[:, None] + i[None, :]) % n


def _of_permutations(elements: Sequence[tuple[int, ...]]) -> np.ndarray:
    number = {element: i for i, element in enumerate(elements)}
    return np.array([[number[tuple(b[i] for i in a)] for b in elements] for a in elements], np.int32)


def _symmetric(n: int) -> np.ndarray:
    return _of_permutations(list(itertools.permutations(range(n))))


def _alternating(n: int) -> np.ndarray:
    is_even = lambda p: sum(p[i] > p[j] for i, j in itertools.combinations(range(n), 2)) % 2 == 0
    return _of_permutations(list(filter(is_even, itertools.permutations(range(n)))))


def _pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The direct product: element a of the first and b of the second are number a * len(second) + b."""
    n = len(first) * len(second)
    a, b = np.divmod(np.arange(n), len(second))
    return (first[a[:, None], a[None, :]] * len(second) + second[b[:, None], b[None, :]]).astype(np.int32)


GROUPS: dict[str, Callable[[], np.ndarray]] = {
    "Z2": lambda: _cyclic(2),
    "Z60": lambda: _cyclic(60),
    "S3": lambda: _symmetric(3),
    "A4xZ5": lambda: _pairs(_alternating(4), _cyclic(5)),
    "A5": lambda: _alternating(5),
    "S5": lambda: _symmetric(5),
}
"""Name of a group -> its table of products."""
