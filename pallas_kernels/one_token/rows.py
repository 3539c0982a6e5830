# SPDX-License-Identifier: Apache-2.0
"""Products of the vectors of up to 64 rows with matrices on a Hopper GPU, with what stands before them: what decoding a
batch is made of. As `products`, whose vectors these are, but for the left operand: a tile of all rows comes beside each
piece of the matrix, and becomes in registers what is multiplied.

A norm's root is one number a row; where the inputs are shared out it is left to whoever adds the shares.

Axis letters: R rows, K inputs, N outputs of a product, S shares of the inputs.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import (
    BF16_TRANSFORMS, COL, F32, PARAMS, TILE, WGMMA, accumulate, cols_of, load_tile, loop_with, named_body, rows_of,
    sums_of, zeros,
)  # fmt: skip
from pallas_kernels.one_token.products import BLOCKS, Vector

RING = 5
"""Pieces of TILE inputs that a thread block holds or has on their way."""
LEAST_SHARE = 512
"""Inputs of a thread block at least."""


@dataclass(frozen=True)
class _Config:
    vector: Vector
    n_inputs: int
    columns: tuple[int, ...]
    shares: int
    eps: float

    @property
    def own(self) -> int:
        """Inputs of a thread block."""
        return self.n_inputs // self.shares

    @property
    def tiles(self) -> int:
        """Of the rows, beside each piece of the matrix."""
        return sum(self.vector.widths[: self.vector.n_rows])


def products(
    vector: Vector, parts: Sequence[jax.Array], weights: Sequence[jax.Array], *, eps: float = 0.0
) -> list[jax.Array]:
    """v times each matrix [K, N], of 64 rows: [R, N] bfloat16. parts: those that differ by row, [R, ...], then those
    that do not."""
    n_inputs = weights[0].shape[0]
    columns = tuple(w.shape[1] for w in weights)
    blocks, shares = sum(columns) // TILE, 1
    while blocks * shares < BLOCKS and n_inputs // (2 * shares) >= LEAST_SHARE:
        shares *= 2
    cfg = _Config(vector, n_inputs, columns, shares, eps)
    *sums, squares = _call(cfg, *parts, *weights)
    if shares == 1:
        return list(sums)
    totals = [y.sum(0) for y in sums]
    if vector.root is not None:
        root = lax.rsqrt(squares.sum(0) * (1 / n_inputs) + eps)
        totals = [y * root[:, None] for y in totals]
    return totals


@functools.partial(jax.jit, static_argnums=0)
def _call(cfg: _Config, *arrays):
    dtype, lead = (jnp.bfloat16, ()) if cfg.shares == 1 else (F32, (cfg.shares,))
    kernel = plgpu.kernel(
        named_body(f"rows_{cfg.vector.name}", _body, cfg),
        out_type=[
            *(jax.ShapeDtypeStruct((*lead, TILE, n), dtype) for n in cfg.columns),
            jax.ShapeDtypeStruct((cfg.shares, TILE), F32),
        ],
        grid=(sum(cfg.columns) // TILE, cfg.shares),
        grid_names=("columns", "share"),
        compiler_params=PARAMS,
    )
    return kernel(*arrays)


def _body(cfg: _Config, *refs):
    n_parts, n = len(cfg.vector.widths), len(cfg.columns)
    parts, weights, outs = refs[:n_parts], refs[n_parts : n_parts + n], refs[n_parts + n :]
    slots = min(RING, cfg.own // TILE)
    tile = lambda *lead: plgpu.MemorySpace.SMEM((*lead, TILE, TILE), jnp.bfloat16, transforms=BF16_TRANSFORMS)
    pl.run_scoped(
        functools.partial(_run, cfg, parts, weights, outs),
        tile(slots),
        tile(slots, cfg.tiles),
        plgpu.Barrier(num_arrivals=1 + cfg.tiles, num_barriers=slots),
    )


def _run(cfg: _Config, parts, weights, outs, ring, rows, bars):
    block, share = lax.axis_index("columns"), lax.axis_index("share")
    steps, slots, first = cfg.own // TILE, ring.shape[0], share * cfg.own
    n_rows = cfg.vector.n_rows

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
        at = first + step * TILE

        def copy(i, column):
            plgpu.copy_gmem_to_smem(weights[i].at[pl.ds(at, TILE), pl.ds(column, TILE)], ring.at[slot], bars.at[slot])

        of_own_matrix(copy)
        tile = 0
        for ref, width in zip(parts[:n_rows], cfg.vector.widths[:n_rows], strict=True):
            for i in range(width):
                source = ref.at[pl.ds(0, TILE), pl.ds(i * cfg.n_inputs + at, TILE)]
                plgpu.copy_gmem_to_smem(source, rows.at[slot, tile], bars.at[slot])
                tile += 1

    for step in range(slots):
        fetch(step, step)

    def multiply(acc):
        def step(k, squares):
            slot = lax.rem(k, slots)
            shared = [
                cols_of(plgpu.load(ref.at[pl.ds(first + k * TILE, TILE)], layout=COL, optimized=False).astype(F32))
                for ref in parts[n_rows:]
            ]
            plgpu.barrier_wait(bars.at[slot])
            own = [load_tile(rows.at[slot, i]) for i in range(cfg.tiles)]
            left = cfg.vector.make(*own, *shared).astype(jnp.bfloat16)
            plgpu.wgmma(acc, left, ring.at[slot])
            if cfg.vector.root is not None:
                u = cfg.vector.root(*own, *shared)
                squares = squares + u * u
            plgpu.wgmma_wait(0)

            @pl.when(k + slots < steps)
            def _():
                plgpu.commit_smem()  # all warps are done with the slot
                fetch(k + slots, slot)

            return squares

        squares = lax.fori_loop(0, steps, step, zeros(TILE))
        return sums_of(acc), squares

    total, squares = accumulate(multiply, TILE)
    squares = jnp.sum(squares, axis=1)
    if cfg.vector.root is not None and cfg.shares == 1:
        total = total * rows_of(lax.rsqrt(squares * (1 / cfg.n_inputs) + cfg.eps))

    def leave(i, column):
        target = outs[i] if cfg.shares == 1 else outs[i].at[share]
        target[:, pl.ds(column, TILE)] = total.astype(target.dtype)

    of_own_matrix(leave)

    @pl.when(block == 0)
    def _():
        outs[-1][share, :] = squares
