# SPDX-License-Identifier: Apache-2.0
"""Words that the TPU kernels (Pallas Mosaic) share: lanes, vectors along them, products on the matrix unit."""

import math

import jax.numpy as jnp
from jax import lax

F32 = jnp.float32
LOG2E = math.log2(math.e)  # softmax is kept in units of log 2
LANES = 128  # of a register
SUBLANES = 8  # of a register of 32-bit numbers

# Dimensions that a product contracts, of its left and its right operand: N as it stands, T transposed.
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


def dot(a, b, dims=NN):
    """Product accumulated in float32; float32 operands in full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == F32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=F32, precision=precision)


def column(row, lanes: int = LANES):
    """[1, n] as [n, lanes]."""
    return jnp.broadcast_to(row, (lanes, row.shape[1])).T


def widen(column_, n: int):
    """[rows, 128] of equal lanes as [rows, n]."""
    return column_[:, :n] if n <= LANES else jnp.tile(column_, (1, -(-n // LANES)))[:, :n]


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
