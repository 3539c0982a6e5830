# SPDX-License-Identifier: Apache-2.0
"""What a kernel costs, by the shapes that it is called with: what no compiler can see inside of it. See `Op.costs`."""

import math
from typing import NamedTuple


class Array(NamedTuple):
    """An operand or result of a kernel."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


class KernelCost(NamedTuple):
    """Of one call."""

    flops: float
    """Multiplications and additions of its matrix products; rows are taken as one document each."""
    bytes: int
    """What it moves at least: every operand read once, every result written once."""


def no_products(operands: list[Array], results: list[Array]) -> float:
    """FLOPs of a kernel without matrix products, as `Op.costs` asks for them."""
    return 0.0
