# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel of the gradient of a gated RMS norm.

A thread block is one warpgroup that walks along rows of its own. Rows come through a ring in shared memory; each is
read twice from there, for its sums and for what is made of them. The gradient of the weights stays in registers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import F32, LANE_PARAMS, LOG2E, named_body
from pallas_kernels.varying import call_varying

STAGES = 3
WIDTH = 256
"""Channels side by side: the most that a copy takes along a dim."""


class Plan(NamedTuple):
    """Static description of a kernel."""

    rows: int
    channels: int
    blocks: int
    eps: float
    before_gate: bool

    @property
    def layout(self):
        return plgpu.Layout.WG_STRIDED(self.shape, vec_size=4)

    @property
    def shape(self) -> tuple[int, int]:
        """Of a row."""
        return self.channels // WIDTH, WIDTH


def _body(plan: Plan, y_g, z_g, w_g, d_g, dy_g, dz_g, dw_g):
    block = lax.axis_index("blocks")
    count = (plan.rows - block + plan.blocks - 1) // plan.blocks  # rows block, block + blocks, ...
    row = lambda i: block + i * plan.blocks
    full_of = lambda value: plgpu.layout_cast(jnp.full(plan.shape, value, F32), plan.layout)

    def scoped(in_s, out_s, w_s, full, of_weights):
        def fetch(i):
            slot = lax.rem(i, STAGES)
            for k, array in enumerate((y_g, z_g, d_g)):
                plgpu.copy_gmem_to_smem(array.at[row(i)], in_s.at[slot, k], full.at[slot])

        def load(slot, k):
            return plgpu.load(in_s.at[slot, k], layout=plan.layout).astype(F32)

        def parts(slot):
            """y, d, the weights, sigmoid of z, z, and what is normed with its gradient's factor before the weights."""
            y, z, d = load(slot, 0), load(slot, 1), load(slot, 2)
            sigmoid = 1.0 / (1.0 + jnp.exp2(z * -LOG2E))
            gate = z * sigmoid
            u, dn = (y, d * gate) if plan.before_gate else (y * gate, d)
            return y, z, d, sigmoid, gate, u, dn

        def step(i, dw):
            slot = lax.rem(i, STAGES)
            plgpu.barrier_wait(full.at[slot])
            w = plgpu.load(w_s, layout=plan.layout)
            *_, u, dn = parts(slot)
            square, across = jnp.sum(u * u), jnp.sum(dn * w * u)
            root = lax.rsqrt(square * (1.0 / plan.channels) + plan.eps)
            mean = root * root * root * across * (1.0 / plan.channels)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()  # all have waited: nobody writes what is still read
            y, z, d, sigmoid, gate, u, dn = parts(slot)
            d_gate = sigmoid * (1.0 + z * (1.0 - sigmoid))
            du = dn * w * root - u * mean
            out_s[0] = (du if plan.before_gate else du * gate).astype(dy_g.dtype)
            out_s[1] = ((d * w * u * root if plan.before_gate else du * y) * d_gate).astype(dz_g.dtype)
            plgpu.commit_smem()  # all have read the slot, too
            plgpu.copy_smem_to_gmem(out_s.at[0], dy_g.at[row(i)])
            plgpu.copy_smem_to_gmem(out_s.at[1], dz_g.at[row(i)])
            pl.when(i + STAGES < count)(lambda: fetch(i + STAGES))
            return dw + dn * u * root

        plgpu.copy_gmem_to_smem(w_g, w_s, of_weights)
        for i in range(STAGES):
            pl.when(i < count)(functools.partial(fetch, i))
        plgpu.barrier_wait(of_weights)
        dw = lax.fori_loop(0, count, step, full_of(0.0))
        plgpu.wait_smem_to_gmem(0)
        w_s[...] = dw
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(w_s, dw_g.at[block])
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        scoped,
        plgpu.SMEM((STAGES, 3, *plan.shape), y_g.dtype),
        plgpu.SMEM((2, *plan.shape), dy_g.dtype),
        plgpu.SMEM(plan.shape, F32),
        plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=1),
    )


@functools.partial(jax.jit, static_argnums=(0,))
def gated_norm_gradients(plan: Plan, y_RC, z_RC, weight_C, d_out_RC):
    """(dy, dz, the gradient of the weights by thread block, [N, C] float32)."""
    shape, of_rows = y_RC.shape, (plan.rows, *plan.shape)
    like = jax.ShapeDtypeStruct(of_rows, jnp.bfloat16)
    kernel = plgpu.kernel(
        named_body("gated_norm_gradients", _body, plan),
        out_type=[like, like, jax.ShapeDtypeStruct((plan.blocks, *plan.shape), F32)],
        grid=(plan.blocks,),
        grid_names=("blocks",),
        compiler_params=LANE_PARAMS,
    )
    rows = [a.reshape(of_rows) for a in (y_RC, z_RC, d_out_RC)]
    arrays = rows[0], rows[1], weight_C.reshape(plan.shape), rows[2]
    dy, dz, dw = call_varying(jax.custom_batching.sequential_vmap(kernel), *arrays)
    return dy.reshape(shape), dz.reshape(shape), dw.reshape(plan.blocks, plan.channels)
