# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the kernels by the shapes of their arrays: x [M, K], w [G, K, N] or [G, N, K] or dy [M, N]. Of how many rows
are in a group shapes say nothing: counted are all."""

from pallas_kernels.cost import Array


def rows(operands: list[Array], results: list[Array]) -> float:
    """Rows times one matrix each."""
    return 2.0 * results[0].shape[0] * results[0].shape[1] * operands[0].shape[1]


def matrices(operands: list[Array], results: list[Array]) -> float:
    """An outer product a row."""
    return 2.0 * operands[0].shape[0] * operands[0].shape[1] * operands[1].shape[1]
