# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the kernel by the shapes of its arrays: x [B, T, W], ..., w [taps and perhaps the bias, W]."""

import math

from pallas_kernels.cost import Array


def backward(operands: list[Array], results: list[Array]) -> float:
    """A multiplication and an addition for each tap, of the inputs' gradient, the weights', and the output again. No
    matrix unit does them."""
    w = next(array for array in operands if len(array.shape) == 2)
    return 6.0 * math.prod(operands[0].shape) * w.shape[0]
