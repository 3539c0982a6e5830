# SPDX-License-Identifier: Apache-2.0
"""Products of one token's vector with matrices on an NVIDIA GPU, with what stands before and behind them: what decoding
one text is made of.

Such a product reads its matrix once and does nothing else, so it takes as long as the memory does; what costs beside it
are small kernels between the products, each of which waits for the one before. Here norm, activation and gate are part
of the product's kernel, and are computed while its matrix is on its way. A norm's root is one number a vector: it
multiplies the sum.

Kernels of Pallas Mosaic GPU for Hopper. A thread block has TILE columns, and of the inputs all or a share; it asks for
as much of the matrix as its ring holds before it looks at the vector. The matrix unit multiplies 64 rows at least: all
of them are the one.

Axis letters: K inputs, N outputs of a product, S shares of the inputs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import BF16_TRANSFORMS, COL, F32, LOG2E, PARAMS, accumulate, loop_with, named_body, sums_of
from pallas_kernels.one_token import SHARE, TILE

ROWS = 128
"""Of a matrix that are fetched at once."""
RING = 6
"""Such pieces that a thread block holds or has on their way: so that two thread blocks fit on a multiprocessor."""
VECTOR = 4
"""Neighbours of a vector that a thread reads at once."""
BLOCKS = 100
"""Thread blocks at least, else the inputs are shared out."""


@dataclass(frozen=True)
class Vector:
    """What a product's kernel makes of its vectors: v, the left operand, and what a norm's root is taken of."""

    name: str
    widths: tuple[int, ...]
    """How often K long each vector is."""
    make: Callable
    """(parts [n] by the K of each vector, float32) -> v [n]."""
    root: Callable | None = None
    """The same -> what is squared for the mean; None: no norm."""


def _sigmoid(x):
    return 1 / (1 + jnp.exp2(-LOG2E * x))


NORMED = Vector("normed", (1, 1), lambda x, weight: x * weight, lambda x, weight: x)
"""x / rms(x) * weight, of x and weight."""
PLAIN = Vector("plain", (1,), lambda x: x)
SILU = Vector("silu", (2,), lambda gate, up: gate * _sigmoid(gate) * up)
"""silu(first half) * second half."""
GATED_NORM = Vector(
    "gated_norm", (1, 1, 1), lambda y, z, weight: y * z * _sigmoid(z) * weight, lambda y, z, weight: y * z * _sigmoid(z)
)
"""norm(y * silu(z)) * weight, of y, z and weight."""
NORM_GATE = Vector(
    "norm_gate", (1, 1, 1), lambda y, z, weight: y * weight * z * _sigmoid(z), lambda y, z, weight: y
)
"""norm(y) * weight * silu(z)."""


VECTORS = {vector.name: vector for vector in (NORMED, PLAIN, SILU, GATED_NORM, NORM_GATE)}
"""By name."""


@dataclass(frozen=True)
class _Config:
    vector: Vector
    n_inputs: int
    columns: tuple[int, ...]
    shares: int
    eps: float
    rounded: bool
    """Whether the sums leave in bfloat16 (one share), else in float32."""

    @property
    def own(self) -> int:
        """Inputs of a thread block."""
        return self.n_inputs // self.shares


def products(vector: Vector, parts: Sequence[jax.Array], weights: Sequence[jax.Array], *, eps: float = 0.0) -> list:
    """v times each matrix [K, N]: sums [S, N], of which S rows are to be added, float32; [N] bfloat16 where there are
    blocks enough without shares. Of a part that is longer than the vector asks for, the rest is not read."""
    n_inputs = weights[0].shape[0]
    columns = tuple(w.shape[1] for w in weights)
    blocks = sum(columns) // TILE
    shares = 1
    while blocks * shares < BLOCKS and n_inputs // (2 * shares) % SHARE == 0:
        shares *= 2
    cfg = _Config(vector, n_inputs, columns, shares, eps, shares == 1)
    return _call(cfg, *parts, *weights)


@functools.partial(jax.jit, static_argnums=0)
def _call(cfg: _Config, *arrays):
    dtype = jnp.bfloat16 if cfg.rounded else F32
    lead = () if cfg.rounded else (cfg.shares,)
    kernel = plgpu.kernel(
        named_body(f"one_row_{cfg.vector.name}", _body, cfg),
        out_type=[jax.ShapeDtypeStruct((*lead, n), dtype) for n in cfg.columns],
        grid=(sum(cfg.columns) // TILE, cfg.shares),
        grid_names=("columns", "share"),
        compiler_params=PARAMS,
    )
    return kernel(*arrays)


def _body(cfg: _Config, *refs):
    n_parts, n = len(cfg.vector.widths), len(cfg.columns)
    slots = min(RING, cfg.own // ROWS)
    pl.run_scoped(
        functools.partial(_run, cfg, refs[:n_parts], refs[n_parts : n_parts + n], refs[n_parts + n :]),
        plgpu.MemorySpace.SMEM((cfg.own,), jnp.bfloat16),
        plgpu.MemorySpace.SMEM((slots, ROWS, TILE), jnp.bfloat16, transforms=BF16_TRANSFORMS),
        plgpu.Barrier(num_barriers=slots),
    )


def _run(cfg: _Config, parts, weights, outs, v_s, ring, bars):
    block, share = lax.axis_index("columns"), lax.axis_index("share")
    steps, slots, first = cfg.own // ROWS, ring.shape[0], share * cfg.own

    def of_own_matrix(work):
        start = 0
        for i, n in enumerate(cfg.columns):
            mine = functools.partial(work, i, (block - start) * TILE)
            if len(cfg.columns) == 1:
                mine()
            else:
                pl.when((block >= start) & (block < start + n // TILE))(mine)
            start += n // TILE

    def fetch(step, slot):
        def copy(i, column):
            rows = pl.ds(first + step * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(weights[i].at[rows, pl.ds(column, TILE)], ring.at[slot], bars.at[slot])

        of_own_matrix(copy)

    def read(begin, n):
        layout = plgpu.Layout.WG_STRIDED((n,), vec_size=VECTOR)
        return [
            plgpu.load(ref.at[pl.ds(i * cfg.n_inputs + begin, n)], layout=layout, optimized=False).astype(F32)
            for ref, width in zip(parts, cfg.vector.widths, strict=True)
            for i in range(width)
        ]

    for step in range(slots):
        fetch(step, step)
    v_s[...] = cfg.vector.make(*read(first, cfg.own)).astype(jnp.bfloat16)
    root = None
    if cfg.vector.root is not None:
        u = cfg.vector.root(*read(0, cfg.n_inputs))
        root = lax.rsqrt(jnp.sum(u * u) * (1 / cfg.n_inputs) + cfg.eps)
    plgpu.commit_smem()  # v_s is read by other threads

    def multiply(acc):
        def step(k, acc):
            slot = lax.rem(k, slots)
            plgpu.barrier_wait(bars.at[slot])
            for j in range(ROWS // TILE):
                v = plgpu.load(v_s.at[pl.ds(k * ROWS + j * TILE, TILE)], layout=COL)
                left = lax.broadcast_in_dim(v, (TILE, TILE), (1,))
                plgpu.wgmma(acc, left, ring.at[slot, pl.ds(j * TILE, TILE)])
            plgpu.wgmma_wait(0)

            @pl.when(k + slots < steps)
            def _():
                fetch(k + slots, slot)

        loop_with(acc, steps, step)
        return sums_of(acc)

    total = accumulate(multiply, TILE)
    total = total if root is None else total * root
    y = jnp.max(total, axis=0)  # all rows are the one

    def leave(i, column):
        target = outs[i] if cfg.rounded else outs[i].at[share]
        target[pl.ds(column, TILE)] = y.astype(target.dtype)

    of_own_matrix(leave)
