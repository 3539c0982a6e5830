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

from pallas_kernels.mosaic_gpu import COL, F32, LOG2E, PARAMS, accumulate, loop_with, named_body, sums_of
from pallas_kernels.one_token import SHARE, TILE

ROWS = 128
"""Of a matrix that are fetched at once."""
RING = 6
"""Such pieces that a thread block holds or has on their way: so that two thread blocks fit on a multiprocessor."""
AHEAD = 2**23
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

    @property
    def n_rows(self) -> int:
        """Vectors that differ by row: all but a norm's weights."""
        return len(self.widths) - (self.root is not None)


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
    tile: int
    """Columns of a thread block."""
    multiplier: float | None
    """Of the product before it is added to what is given beside it; None: nothing is added."""
    ahead: tuple[int, int] | None
    """Of a matrix that is read next: its size."""

    @property
    def rounded(self) -> bool:
        """Whether the sums leave in bfloat16, else, of shares, in float32."""
        return self.shares == 1

    @property
    def own(self) -> int:
        """Inputs of a thread block."""
        return self.n_inputs // self.shares


PDL = False
LATE = False


def products(
    vector: Vector, parts: Sequence[jax.Array], weights: Sequence[jax.Array], *, eps: float = 0.0,
    onto: jax.Array | None = None, multiplier: float = 1.0, tile: int = TILE, shares: int | None = None,
    ahead: jax.Array | None = None,
) -> list:  # fmt: skip
    """v times each matrix [K, N]: sums [S, N], of which S rows are to be added, float32; [N] bfloat16 where there are
    blocks enough without shares. Of a part that is longer than the vector asks for, the rest is not read.

    onto: [N], to which the product is added.
    """
    n_inputs = weights[0].shape[0]
    columns = tuple(w.shape[1] for w in weights)
    blocks = sum(columns) // tile
    if shares is None:
        shares = 1
        while blocks * shares < BLOCKS and n_inputs // (2 * shares) % SHARE == 0:
            shares *= 2
    cfg = _Config(
        vector, n_inputs, columns, shares, eps, tile, None if onto is None else multiplier,
        None if ahead is None else ahead.shape,
    )
    return _call(cfg, PDL, *parts, *weights, *(a for a in (onto, ahead) if a is not None))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(cfg: _Config, pdl, *arrays):
    dtype = jnp.bfloat16 if cfg.rounded else F32
    lead = () if cfg.rounded else (cfg.shares,)
    kernel = plgpu.kernel(
        named_body(f"one_row_{cfg.vector.name}", _body, cfg),
        out_type=[jax.ShapeDtypeStruct((*lead, n), dtype) for n in cfg.columns],
        grid=(sum(cfg.columns) // cfg.tile, cfg.shares),
        grid_names=("columns", "share"),
        compiler_params=PARAMS,
    )
    return kernel(*arrays)


def _body(cfg: _Config, *refs):
    n_parts, n = len(cfg.vector.widths), len(cfg.columns)
    parts, weights, rest = refs[:n_parts], refs[n_parts : n_parts + n], list(refs[n_parts + n :])
    onto = None if cfg.multiplier is None else rest.pop(0)
    ahead = None if cfg.ahead is None else rest.pop(0)
    slots = min(RING, cfg.own // ROWS)
    transforms = (plgpu.TilingTransform((8, cfg.tile)), plgpu.SwizzleTransform(2 * cfg.tile))
    pl.run_scoped(
        functools.partial(_run, cfg, parts, weights, onto, ahead, rest),
        plgpu.MemorySpace.SMEM((cfg.own,), jnp.bfloat16),
        plgpu.MemorySpace.SMEM((slots, ROWS, cfg.tile), jnp.bfloat16, transforms=transforms),
        plgpu.Barrier(num_barriers=slots),
    )


def _run(cfg: _Config, parts, weights, onto, ahead, outs, v_s, ring, bars):
    block, share = lax.axis_index("columns"), lax.axis_index("share")
    steps, slots, first = cfg.own // ROWS, ring.shape[0], share * cfg.own
    tile = cfg.tile

    def of_own_matrix(work):
        start = 0
        for i, n in enumerate(cfg.columns):
            mine = functools.partial(work, i, (block - start) * tile)
            if len(cfg.columns) == 1:
                mine()
            else:
                pl.when((block >= start) & (block < start + n // tile))(mine)
            start += n // tile

    def fetch(step, slot):
        def copy(i, column):
            rows = pl.ds(first + step * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(weights[i].at[rows, pl.ds(column, tile)], ring.at[slot], bars.at[slot])

        of_own_matrix(copy)

    def read(begin, n):
        layout = plgpu.Layout.WG_STRIDED((n,), vec_size=VECTOR)
        return [
            plgpu.load(ref.at[pl.ds(i * cfg.n_inputs + begin, n)], layout=layout, optimized=False).astype(F32)
            for ref, width in zip(parts, cfg.vector.widths, strict=True)
            for i in range(width)
        ]

    if PDL and not LATE:
        plgpu.griddepcontrol_launch_dependents()
    for step in range(slots):
        fetch(step, step)
    if PDL:
        plgpu.griddepcontrol_wait()
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
                plgpu.commit_smem()  # all warps are done with the slot
                fetch(k + slots, slot)

        loop_with(acc, steps, step)
        return sums_of(acc)

    if ahead is not None:
        blocks = sum(cfg.columns) // tile * cfg.shares
        number = block * cfg.shares + share
        n = min(AHEAD // (2 * cfg.ahead[1]), cfg.ahead[0]) // blocks  # rows of it
        for column in range(0, cfg.ahead[1], 256):
            plgpu.async_prefetch(ahead.at[pl.ds(number * n, n), pl.ds(column, 256)])
    total = accumulate(multiply, tile)
    if PDL and LATE:
        plgpu.griddepcontrol_launch_dependents()
    total = total if root is None else total * root
    y = jnp.max(total, axis=0)  # all rows are the one

    if cfg.multiplier is not None:
        old = plgpu.load(onto.at[pl.ds(block * tile, tile)], layout=COL, optimized=False)
        y = y.astype(jnp.bfloat16).astype(F32)
        y = old.astype(F32) + (y if cfg.multiplier == 1 else y * cfg.multiplier)

    def leave(i, column):
        target = outs[i] if cfg.rounded else outs[i].at[share]
        target[pl.ds(column, tile)] = y.astype(target.dtype)

    of_own_matrix(leave)
