# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the kernels by the shapes of their arrays: q and k [B, T, G, N], decays by channel [B, T, H, N], values and
what has their shape [B, T, H, P], ... Where decays are of channels, a chunk is six levels."""

import math

from pallas_kernels.cost import Array
from pallas_kernels.mosaic_gpu import TILE

LEVELS = 6  # of a chunk whose channels decay by themselves
_INVERSE = 24 * TILE**2  # a token's share: two times two products of two terms each


def _of_values(key: int, width: int) -> int:
    """A token's share of three products of a tile with a state and two of pairs: of each kernel with states."""
    return width * (6 * key + 4 * TILE)


def _tokens(values: Array) -> int:
    return math.prod(values.shape[:3])


def walk(operands: list[Array], results: list[Array]) -> float:
    """Products of queries and keys among each other, the inverse, then those with states."""
    q, _, v = operands[:3]
    return _tokens(v) * (6 * TILE * q.shape[3] + _INVERSE + _of_values(q.shape[3], v.shape[3]))


def reverse_walk(operands: list[Array], results: list[Array]) -> float:
    """Of q, k and the gradient of y."""
    q, _, dy = operands[:3]
    return _tokens(dy) * _of_values(q.shape[3], dy.shape[3])


def gradients(operands: list[Array], results: list[Array]) -> float:
    """Products with states, then four of pairs with queries or keys, a level; the third operand is g or dy."""
    dq = results[0]
    key, width = dq.shape[3], operands[3].shape[3]
    levels = LEVELS if operands[2].itemsize == 4 else 1
    return _tokens(dq) * (_of_values(key, width) + 8 * TILE * key * levels)


def channel_chunks(operands: list[Array], results: list[Array]) -> float:
    """Two products of a level and the inverse."""
    g = operands[2]
    return _tokens(g) * (4 * TILE * g.shape[3] * LEVELS + _INVERSE)


def channel_walk(operands: list[Array], results: list[Array]) -> float:
    """Of weighed queries, and of results of which the first has the shape of the values."""
    return _tokens(results[0]) * _of_values(operands[0].shape[3], results[0].shape[3])
