# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the kernels by the shapes of their arrays: q [B, T, H, P], k and v [B, S, K, P]. Of which pairs tokens see
each other shapes say nothing: counted are those of one causal document a row, half of all."""

from pallas_kernels.cost import Array


def forward(operands: list[Array], results: list[Array]) -> float:
    """Scores and sums of values."""
    return 4.0 * _pairs(operands)


def backward(operands: list[Array], results: list[Array]) -> float:
    """Scores again and the gradients of probabilities, queries, keys and values."""
    return 10.0 * _pairs(operands)


def _pairs(operands: list[Array]) -> float:
    """Visible pairs of query and key, times the width of all heads."""
    rows, n_queries, heads, width = operands[0].shape
    return rows * n_queries * (operands[1].shape[1] + 1) / 2 * heads * width
