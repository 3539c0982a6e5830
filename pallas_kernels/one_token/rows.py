# SPDX-License-Identifier: Apache-2.0
"""Products of the vectors of up to 64 rows with matrices on a Hopper GPU, with what stands before them: what decoding a
batch is made of. As `one_row`, but for the left operand: a tile of all rows comes beside each piece of the matrix, and
becomes in registers what is multiplied. The copy engine reads zeros for rows that are not there, and writes none.

A norm's root is one number a row; where the inputs are shared out it multiplies the sum of the shares.

Axis letters: R rows, K inputs, N outputs of a product, S shares of the inputs.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import (
    BF16_TRANSFORMS,
    COL,
    F32,
    F32_TRANSFORMS,
    PARAMS,
    TILE,
    accumulate,
    carry_with,
    cols_of,
    load_tile,
    named_body,
    rows_of,
    sums_of,
    zeros,
)  # fmt: skip
from pallas_kernels.one_token.vectors import Cut, cut

HELD = 12
"""Tiles, of the matrix and of what stands beside it, that a thread block holds or has on their way: so that two thread
blocks fit on a multiprocessor."""
LEAST = 512
"""Inputs of a share at least."""
MULTIPLE = 1
"""Rows are padded to it: interpreters have nothing outside an array."""


def products(
    name: str, parts: Sequence[jax.Array], weights: Sequence[jax.Array], *, eps: float = 0.0
) -> list[jax.Array]:  # fmt: skip
    """v times each matrix [K, N], of up to 64 rows: [R, N], bfloat16 or, where shares were added, float32.

    name, parts: of `vectors.VECTORS`, [R, ...] but for a norm's weights. eps: of the norm.
    """
    cfg, n_rows = cut(name, weights, eps, LEAST), parts[0].shape[0]
    pad = -n_rows % MULTIPLE
    by_row = [jnp.pad(part, ((0, pad), (0, 0))) if pad else part for part in parts[: cfg.vector.n_rows]]
    *sums, squares = _call(cfg, *by_row, *parts[cfg.vector.n_rows :], *weights)
    if cfg.shares > 1:
        sums = [y.sum(0) for y in sums]
        if cfg.vector.root is not None:
            root_R1 = lax.rsqrt(squares.sum(0) * (1 / cfg.n_inputs) + eps)[: sums[0].shape[0], None]
            sums = [y * root_R1 for y in sums]
    return [y[:n_rows] for y in sums] if pad else list(sums)


@functools.partial(jax.jit, static_argnums=0)
def _call(cfg: Cut, *arrays):
    kernel = plgpu.kernel(
        named_body(f"rows_{cfg.vector.name}", _body, cfg),
        out_type=[*cfg.out(arrays[0].shape[0]), jax.ShapeDtypeStruct((cfg.shares, TILE), F32)],
        grid=cfg.grid,
        grid_names=("columns", "share"),
        compiler_params=PARAMS,
    )
    return kernel(*arrays)


def _body(cfg: Cut, *refs):
    n_parts, n = len(cfg.vector.widths), len(cfg.columns)
    tiles = sum(cfg.vector.widths[: cfg.vector.n_rows])
    slots = min(HELD // (1 + tiles), cfg.own // TILE)
    smem = lambda *lead: plgpu.MemorySpace.SMEM((*lead, TILE, TILE), jnp.bfloat16, transforms=BF16_TRANSFORMS)
    whole = cfg.shares == 1
    pl.run_scoped(
        functools.partial(_run, cfg, refs[:n_parts], refs[n_parts : n_parts + n], refs[n_parts + n :]),
        smem(slots),
        smem(slots, tiles),
        smem() if whole else plgpu.MemorySpace.SMEM((TILE, TILE), F32, transforms=F32_TRANSFORMS),
        plgpu.Barrier(num_arrivals=1 + tiles, num_barriers=slots),
    )


def _run(cfg: Cut, parts, weights, outs, ring, rows, out_s, bars):
    block, share = lax.axis_index("columns"), lax.axis_index("share")
    steps, slots, first = cfg.own // TILE, ring.shape[0], share * cfg.own
    n_rows = cfg.vector.n_rows
    all_rows = pl.ds(block * 0, TILE)  # not known while it is traced: they may reach outside

    def fetch(step, slot):
        at = first + step * TILE

        def copy(i, column):
            plgpu.copy_gmem_to_smem(weights[i].at[pl.ds(at, TILE), pl.ds(column, TILE)], ring.at[slot], bars.at[slot])

        cfg.in_own_matrix(block, copy)
        places = [(ref, i) for ref, n in zip(parts[:n_rows], cfg.vector.widths, strict=False) for i in range(n)]
        for tile, (ref, i) in enumerate(places):
            columns = pl.ds(i * cfg.n_inputs + at, TILE)
            plgpu.copy_gmem_to_smem(ref.at[all_rows, columns], rows.at[slot, tile], bars.at[slot])

    for step in range(slots):
        fetch(step, step)

    def multiply(acc):
        def step(k, acc, squares):
            slot = lax.rem(k, slots)
            shared = [
                cols_of(plgpu.load(ref.at[pl.ds(first + k * TILE, TILE)], layout=COL, optimized=False).astype(F32))
                for ref in parts[n_rows:]
            ]
            plgpu.barrier_wait(bars.at[slot])
            own = [load_tile(rows.at[slot, i]) for i in range(rows.shape[1])]
            plgpu.wgmma(acc, cfg.vector.make(*own, *shared).astype(jnp.bfloat16), ring.at[slot])
            if cfg.vector.root is not None:
                u = cfg.vector.root(*own, *shared)
                squares = squares + u * u
            plgpu.wgmma_wait(0)

            @pl.when(k + slots < steps)
            def _():
                plgpu.commit_smem()  # all warps are done with the slot
                fetch(k + slots, slot)

            return squares

        squares = carry_with(acc, steps, step, zeros(TILE))
        return sums_of(acc), squares

    total, squares = accumulate(multiply, TILE)
    squares = jnp.sum(squares, axis=1)
    if cfg.vector.root is not None and cfg.shares == 1:
        total = total * rows_of(lax.rsqrt(squares * (1 / cfg.n_inputs) + cfg.eps))
    out_s[...] = total.astype(out_s.dtype)
    plgpu.commit_smem()

    def leave(i, column):
        target = outs[i] if cfg.shares == 1 else outs[i].at[share]
        plgpu.copy_smem_to_gmem(out_s, target.at[all_rows, pl.ds(column, TILE)])

    cfg.in_own_matrix(block, leave)

    @pl.when(block == 0)
    def _():
        outs[-1][share, :] = squares

    plgpu.wait_smem_to_gmem(0)
