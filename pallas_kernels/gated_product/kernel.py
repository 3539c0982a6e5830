# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel of the gradient of silu(gate) * up.

A thread block is one warpgroup that walks over tiles of its own; they come through a ring in shared memory.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import F32, LOG2E, over_blocks
from pallas_kernels.varying import call_varying

STAGES = 3


class Plan(NamedTuple):
    """Static description of a kernel."""

    rows: int
    columns: int
    tile: tuple[int, int]
    """Rows and columns."""
    blocks: int

    @property
    def tiles(self) -> tuple[int, int]:
        """Along rows and columns."""
        return self.rows // self.tile[0], self.columns // self.tile[1]

    @property
    def layout(self):
        return plgpu.Layout.WG_STRIDED(self.tile, vec_size=8)


def _body(plan: Plan, h_g, d_g, dh_g):
    block, (n_rows, n_columns) = lax.axis_index("blocks"), plan.tiles
    count = (n_rows * n_columns - block + plan.blocks - 1) // plan.blocks

    def at(i):
        """Along columns first."""
        number = block + i * plan.blocks
        row, column = lax.div(number, n_columns), lax.rem(number, n_columns)
        return pl.ds(row * plan.tile[0], plan.tile[0]), pl.ds(column * plan.tile[1], plan.tile[1])

    def scoped(in_s, out_s, arrived):
        def fetch(i):
            slot, (rows, columns) = lax.rem(i, STAGES), at(i)
            for k, part in enumerate((h_g.at[rows, 0, columns], h_g.at[rows, 1, columns], d_g.at[rows, columns])):
                plgpu.copy_gmem_to_smem(part, in_s.at[slot, k], arrived.at[slot])

        def step(i, _):
            slot, out = lax.rem(i, STAGES), lax.rem(i, 2)
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # all threads: nobody writes what is still read
            plgpu.barrier_wait(arrived.at[slot])
            gate, up, d = (plgpu.load(in_s.at[slot, k], layout=plan.layout).astype(F32) for k in range(3))
            sigmoid = 1.0 / (1.0 + jnp.exp2(gate * -LOG2E))
            active = gate * sigmoid
            out_s[out, 0] = (d * up * (sigmoid + active * (1.0 - sigmoid))).astype(dh_g.dtype)
            out_s[out, 1] = (d * active).astype(dh_g.dtype)
            plgpu.commit_smem()  # all have read the slot, too
            rows, columns = at(i)
            for k in range(2):
                plgpu.copy_smem_to_gmem(out_s.at[out, k], dh_g.at[rows, k, columns])
            pl.when(i + STAGES < count)(lambda: fetch(i + STAGES))

        for i in range(STAGES):
            pl.when(i < count)(functools.partial(fetch, i))
        lax.fori_loop(0, count, step, None)
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        scoped,
        plgpu.SMEM((STAGES, 3, *plan.tile), h_g.dtype),
        plgpu.SMEM((2, 2, *plan.tile), dh_g.dtype),
        plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
    )


@functools.partial(jax.jit, static_argnums=(0,))
def gated_product_gradients(plan: Plan, h_RcF, d_RF):
    """The gradient of h."""
    out_type = jax.ShapeDtypeStruct(h_RcF.shape, h_RcF.dtype)
    kernel = over_blocks("gated_product_gradients", functools.partial(_body, plan), plan.blocks, out_type)
    return call_varying(jax.custom_batching.sequential_vmap(kernel), h_RcF, d_RF)
