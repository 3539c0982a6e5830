# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the kernels by the shapes of their arrays: x [B, T, H, P], decays, B and C [B, T, G, N], ..., and the states
[B, T / 128, H, P, N] before each span of two tiles."""

import math

from pallas_kernels.cost import Array
from pallas_kernels.mosaic_gpu import TILE


def nothing(operands: list[Array], results: list[Array]) -> float:
    """Of a kernel without matrix products."""
    return 0.0


def walk(operands: list[Array], results: list[Array]) -> float:
    """Of the state, updated; where outputs are made, read as well, with the values of pairs in a tile, whose scores two
    heads of a group may share. Of all tokens: a walk for the states that pieces start from leaves out one of them,
    which its arrays do not tell."""
    x, _, B = operands[:3]
    heads, width, groups, state = *x.shape[2:], *B.shape[2:]
    made = 2 * width * state
    if results[0].shape == x.shape:
        shared = 2 if heads // groups % 2 == 0 and state <= 128 else 1
        made += 2 * width * state + 2 * TILE * width + 2 * TILE * state / shared
    return math.prod(x.shape[:2]) * heads * made


def gradients(operands: list[Array], results: list[Array]) -> float:
    """A head has four products of tiles with states; of pairs three in a tile and six in the first of a span, whose
    tokens meet those of the second, too. Scores and their gradients, two products more, are of a block of heads."""
    x, _, _, B = operands[:4]
    tokens, heads, width, state = math.prod(x.shape[:2]), x.shape[2], x.shape[3], B.shape[3]
    blocks = next(math.prod(a.shape[1::3]) for a in results if len(a.shape) == 6)  # [B, parts, T / 64, 64, G, N]
    return tokens * (heads * (8 * width * state + 9 * TILE * width) + blocks * 9 * TILE * state)
