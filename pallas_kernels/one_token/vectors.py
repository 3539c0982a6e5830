# SPDX-License-Identifier: Apache-2.0
"""What the kernels of products make of their vectors, and how products are cut into thread blocks.

Axis letters: K inputs, N outputs of a product.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_gpu import F32, LOG2E, TILE
from pallas_kernels.one_token.limits import SHARE

BLOCKS = 100
"""Thread blocks at least, else the inputs are shared out."""


@dataclass(frozen=True)
class Vector:
    """What a product's kernel makes of its vectors: v, which is multiplied, and what a norm's root is taken of."""

    name: str
    widths: tuple[int, ...]
    """How often K long each vector is."""
    make: Callable
    """(parts by the K of each vector, float32) -> v, alike."""
    root: Callable | None = None
    """The same -> what is squared for the mean; None: no norm. The last vector is its weights, float32."""


def _silu(x):
    return x / (1 + jnp.exp2(-LOG2E * x))


VECTORS = {
    vector.name: vector
    for vector in (
        Vector("plain", (1,), lambda x: x),
        Vector("normed", (1, 1), lambda x, weight: x * weight, lambda x, weight: x),
        Vector("silu", (2,), lambda gate, up: _silu(gate) * up),
        Vector("gated_norm", (1, 1, 1), lambda y, z, weight: y * _silu(z) * weight, lambda y, z, weight: y * _silu(z)),
        Vector("norm_gate", (1, 1, 1), lambda y, z, weight: y * weight * _silu(z), lambda y, z, weight: y),
    )
}
"""By name: x; norm(x); silu(first half) * second half; norm(y * silu(z)); norm(y) * silu(z)."""


@dataclass(frozen=True)
class Cut:
    """How a product is cut into thread blocks."""

    vector: Vector
    n_inputs: int
    columns: tuple[int, ...]
    """Of each matrix."""
    shares: int
    eps: float

    @property
    def own(self) -> int:
        """Inputs of a thread block."""
        return self.n_inputs // self.shares

    @property
    def grid(self) -> tuple[int, int]:
        """Thread blocks, by columns and shares."""
        return sum(self.columns) // TILE, self.shares

    def out(self) -> list[jax.ShapeDtypeStruct]:
        """Sums: bfloat16, of shares float32."""
        shared, dtype = ((), jnp.bfloat16) if self.shares == 1 else ((self.shares,), F32)
        return [jax.ShapeDtypeStruct((*shared, n), dtype) for n in self.columns]

    def in_own_matrix(self, block, work) -> None:
        """`work(matrix, first column)` of a thread block, at run time."""
        start = 0
        for i, n in enumerate(self.columns):
            mine = functools.partial(work, i, (block - start) * TILE)
            if len(self.columns) == 1:
                mine()
            else:
                pl.when((block >= start) & (block < start + n // TILE))(mine)
            start += n // TILE


def cut(name: str, weights: Sequence[jax.Array], eps: float) -> Cut:
    """For matrices [K, N]."""
    n_inputs, columns = weights[0].shape[0], tuple(w.shape[1] for w in weights)
    blocks, shares = sum(columns) // TILE, 1
    while blocks * shares < BLOCKS and n_inputs % (2 * shares * SHARE) == 0:
        shares *= 2
    return Cut(VECTORS[name], n_inputs, columns, shares, eps)
