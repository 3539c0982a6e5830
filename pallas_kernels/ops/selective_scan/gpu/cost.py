# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the kernels by the shapes of their arrays: x [B, T, D], dt, B [B, T, G, N], ... No matrix unit does them."""

import math

from pallas_kernels.cost import Array


def walk(operands: list[Array], results: list[Array]) -> float:
    """Decay times state, plus dt x times B, times C: a multiplication and an addition each."""
    return 6.0 * math.prod(operands[0].shape) * operands[2].shape[-1]


def gradients(operands: list[Array], results: list[Array]) -> float:
    """Three times the forward's, as the maths needs them."""
    return 3.0 * walk(operands, results)
