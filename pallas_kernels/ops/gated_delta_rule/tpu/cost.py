# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the kernels by the shapes of their arrays: q and k [B, T, G N], v or what has its shape [B, T, H P], states
[B, chunks, H, N, P]. bfloat16 arrays have products of several terms, each of which counts."""

from typing import NamedTuple

from pallas_kernels.cost import Array
from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.ops.gated_delta_rule.tpu.products import CHUNK


class Products(NamedTuple):
    """How many of each kind a chunk of a head takes."""

    alone: int
    """[tokens, tokens] by [tokens, tokens]: the inverse, sums of decays."""
    keys: int
    """[tokens, N] by [N, tokens], pairs of tokens: of each group where heads decay, of each head where channels do."""
    values: int
    """[tokens, tokens] by [tokens, P]."""
    states: int
    """[tokens, N] by [N, P]."""


FORWARD = {2: Products(27, 2, 6, 4), 4: Products(11, 2, 2, 3)}  # by bytes of a value
BACKWARD = {2: Products(6, 10, 18, 15), 4: Products(6, 6, 6, 8)}
CHANNEL_FORWARD = {2: Products(24, 30, 6, 5), 4: Products(8, 10, 2, 3)}
CHANNEL_BACKWARD = {2: Products(0, 90, 18, 16), 4: Products(0, 30, 6, 8)}


def _flops(count: Products, keys: Array, v: Array, states: list[Array]) -> float:
    """keys: the array whose merged channels take the products of keys. Without states heads are taken as 128 wide."""
    n_heads, key, width = states[0].shape[2:] if states else (v.shape[2] // LANES, LANES, LANES)
    tokens = keys.shape[0] * keys.shape[1]
    of_heads = n_heads * (count.alone * CHUNK**2 + count.values * CHUNK * width + count.states * key * width)
    return 2.0 * tokens * (of_heads + count.keys * CHUNK * keys.shape[2])


def _states(arrays: list[Array]) -> list[Array]:
    return [array for array in arrays if len(array.shape) == 5]


def forward(operands: list[Array], results: list[Array]) -> float:
    """Of q, k, v and gates."""
    return _flops(FORWARD[operands[0].itemsize], operands[0], operands[2], _states(results))


def backward(operands: list[Array], results: list[Array]) -> float:
    """Of the same, states, inverses and gradients."""
    return _flops(BACKWARD[operands[0].itemsize], operands[0], operands[2], _states(operands))


def channel_forward(operands: list[Array], results: list[Array]) -> float:
    """Of q, k, v, gates and log decays [B, T, H N]."""
    return _flops(CHANNEL_FORWARD[operands[0].itemsize], operands[4], operands[2], _states(results))


def channel_backward(operands: list[Array], results: list[Array]) -> float:
    """Of the same, states, inverses and gradients."""
    return _flops(CHANNEL_BACKWARD[operands[0].itemsize], operands[4], operands[2], _states(operands))
