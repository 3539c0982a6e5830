# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the kernels by the shapes of their arrays: x [B, T, W], ..., w [taps and perhaps the bias, W]. No matrix
unit does them."""

import math

from pallas_kernels.cost import Array


def forward(operands: list[Array], results: list[Array]) -> float:
    """A multiplication and an addition for each tap."""
    w = next(array for array in operands if len(array.shape) == 2)
    return 2.0 * math.prod(operands[0].shape) * w.shape[0]


def backward(operands: list[Array], results: list[Array]) -> float:
    """Of the inputs' gradient, the weights', and the output again."""
    return 3.0 * forward(operands, results)
