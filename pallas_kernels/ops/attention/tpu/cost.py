# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the kernels by the shapes of their arrays. Of which pairs tokens see each other shapes say nothing: counted
are those of one causal document a row, half of all."""

from pallas_kernels.cost import Array


def forward(operands: list[Array], results: list[Array]) -> float:
    """Scores and sums of values."""
    return 4.0 * _pairs(operands, results) * _width(operands)


def backward(operands: list[Array], results: list[Array]) -> float:
    """Scores again and the gradients of probabilities, queries, keys and values."""
    return 10.0 * _pairs(operands, results) * _width(operands)


def _pairs(operands: list[Array], results: list[Array]) -> float:
    """Visible pairs of query and key, over rows."""
    rows = next(a for a in operands if len(a.shape) >= 3).shape[0]
    n_queries, n_keys = _tokens(operands, 0), _tokens(operands, 1)
    return rows * n_queries * (n_keys + 1) / 2


def _tokens(operands: list[Array], which: int) -> int:
    """Of queries (0) or keys (1): [B, T, H P], or [B, H, T, P] where heads are apart."""
    return [a for a in operands if len(a.shape) >= 3][which].shape[-2]


def _width(operands: list[Array]) -> int:
    """Heads times head width of the queries."""
    q = next(a for a in operands if len(a.shape) >= 3)
    return q.shape[-1] * (q.shape[1] if len(q.shape) == 4 else 1)
