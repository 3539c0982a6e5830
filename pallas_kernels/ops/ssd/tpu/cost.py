# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the kernels by the shapes of their arrays: x [B, T, H P], dt [B, n, H / n, T], A, B [B, T, G N], ..., and
the states [B, steps, H P, N] before each grid step."""

import math

from pallas_kernels.cost import Array
from pallas_kernels.ops.ssd.tpu.common import CHUNK


def forward(operands: list[Array], results: list[Array]) -> float:
    """Of pairs in a chunk, once a group; with them, the products of values; and the state, read and written."""
    tokens, width, lanes, _ = _sizes(operands)
    return tokens * (2 * CHUNK * lanes + width * (2 * CHUNK + 4 * _state(operands, results)))


def backward(operands: list[Array], results: list[Array]) -> float:
    """Of pairs three products a group. A head has of pairs two with its values and two of sums along the chunk, and
    six of states: entering ones made again, read, and four gradients."""
    tokens, width, lanes, heads = _sizes(operands)
    sums = 4 * CHUNK * CHUNK * heads
    return tokens * (6 * CHUNK * lanes + sums + width * (4 * CHUNK + 12 * _state(operands, results)))


def _sizes(operands: list[Array]) -> tuple[int, int, int, int]:
    """(tokens of all rows, H P, G N, H)."""
    x, dt, _, B = operands[:4]
    return math.prod(x.shape[:2]), x.shape[2], B.shape[2], dt.shape[1] * dt.shape[2]


def _state(operands: list[Array], results: list[Array]) -> int:
    """N; where no states are kept, as if there were one group."""
    x, _, _, B = operands[:4]
    kept = [a for a in (*operands, *results) if a.shape[-2:-1] == x.shape[2:] and len(a.shape) == 4]
    return kept[0].shape[-1] if kept else B.shape[2]
