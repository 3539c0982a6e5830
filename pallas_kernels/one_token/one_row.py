# SPDX-License-Identifier: Apache-2.0
"""Products of one token's vector with matrices on a Hopper GPU, with what stands before them: what decoding one text is
made of.

Such a product reads its matrix once and does nothing else, so it takes as long as the memory does; what costs beside it
are small kernels between the products, each of which waits for the one before. Here norm, activation and gate are part
of the product's kernel, and are computed while its matrix is on its way. A norm's root is one number a vector: it
multiplies the sum.

A kernel of Pallas Mosaic GPU. A thread block has TILE columns, and of the inputs all or a share; it asks for as much of
the matrix as its ring holds before it looks at the vector. The matrix unit multiplies 64 rows at least: all of them are
the one.

Axis letters: K inputs, N outputs of a product, S shares of the inputs.
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
    PARAMS,
    TILE,
    accumulate,
    loop_with,
    named_body,
    sums_of,
)
from pallas_kernels.one_token.vectors import Cut, cut

PIECE = 256
"""Rows of a matrix that are fetched at once, the most that the copy engine takes."""
RING = 3
"""Pieces that a thread block holds or has on their way: so that two thread blocks fit on a multiprocessor."""
NEIGHBOURS = 4
"""Of a vector that a thread reads at once."""


def products(
    name: str, parts: Sequence[jax.Array], weights: Sequence[jax.Array], *, eps: float = 0.0
) -> list[jax.Array]:  # fmt: skip
    """v times each matrix [K, N]: [N], bfloat16 or, where shares were added, float32.

    name, parts: of `vectors.VECTORS`. Of a part that is longer than its vector the rest is not read. eps: of the norm.
    """
    sums = _call(cut(name, weights, eps), *parts, *weights)
    return [y if y.ndim == 1 else y.sum(0) for y in sums]


@functools.partial(jax.jit, static_argnums=0)
def _call(cfg: Cut, *arrays):
    kernel = plgpu.kernel(
        named_body(f"one_row_{cfg.vector.name}", _body, cfg),
        out_type=cfg.out(),
        grid=cfg.grid,
        grid_names=("columns", "share"),
        compiler_params=PARAMS,
    )
    return kernel(*arrays)


def _body(cfg: Cut, *refs):
    n_parts, n = len(cfg.vector.widths), len(cfg.columns)
    slots = min(RING, cfg.own // PIECE)
    pl.run_scoped(
        functools.partial(_run, cfg, refs[:n_parts], refs[n_parts : n_parts + n], refs[n_parts + n :]),
        plgpu.MemorySpace.SMEM((cfg.own,), jnp.bfloat16),
        plgpu.MemorySpace.SMEM((slots, PIECE, TILE), jnp.bfloat16, transforms=BF16_TRANSFORMS),
        plgpu.Barrier(num_barriers=slots),
    )


def _run(cfg: Cut, parts, weights, outs, v_s, ring, bars):
    block, share = lax.axis_index("columns"), lax.axis_index("share")
    steps, slots, first = cfg.own // PIECE, ring.shape[0], share * cfg.own

    def fetch(step, slot):
        def copy(i, column):
            rows = pl.ds(first + step * PIECE, PIECE)
            plgpu.copy_gmem_to_smem(weights[i].at[rows, pl.ds(column, TILE)], ring.at[slot], bars.at[slot])

        cfg.in_own_matrix(block, copy)

    def read(begin, n):
        layout = plgpu.Layout.WG_STRIDED((n,), vec_size=NEIGHBOURS)
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
            for j in range(PIECE // TILE):
                v = plgpu.load(v_s.at[pl.ds(k * PIECE + j * TILE, TILE)], layout=COL)
                left = lax.broadcast_in_dim(v, (TILE, TILE), (1,))
                plgpu.wgmma(acc, left, ring.at[slot, pl.ds(j * TILE, TILE)])
            plgpu.wgmma_wait(0)

            @pl.when(k + slots < steps)
            def _():
                plgpu.commit_smem()  # all warps are done with the slot
                fetch(k + slots, slot)

        loop_with(acc, steps, step)
        return sums_of(acc)

    total = accumulate(multiply, TILE)
    y = jnp.max(total if root is None else total * root, axis=0)  # all rows are the one

    def leave(i, column):
        target = outs[i] if cfg.shares == 1 else outs[i].at[share]
        target[pl.ds(column, TILE)] = y.astype(target.dtype)

    cfg.in_own_matrix(block, leave)
