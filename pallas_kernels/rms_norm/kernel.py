# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel of the gradient of an RMS norm.

A thread block is one warpgroup that walks along rows of its own. Rows come through a ring in shared memory; each is
read once from there. The gradient of the weights stays in registers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import F32, LANE_PARAMS, named_body
from pallas_kernels.varying import call_varying

STAGES, OUT_STAGES = 3, 2
WIDTH = 256
"""Channels side by side: the most that a copy takes along a dim."""
SHARED = 220 * 1024
"""Bytes of shared memory that the thread blocks of a multiprocessor take."""
MOST_BLOCKS = 3
"""Of a multiprocessor."""


class Plan(NamedTuple):
    """Static description of a kernel."""

    rows: int
    channels: int
    blocks: int
    n_grads: int
    eps: float

    @property
    def layout(self):
        return plgpu.Layout.WG_STRIDED(self.shape, vec_size=4)

    @property
    def shape(self) -> tuple[int, int]:
        """Of a row."""
        return self.channels // WIDTH, WIDTH


def make_plan(rows: int, channels: int, n_grads: int, eps: float, multiprocessors: int) -> Plan:
    """As many thread blocks as fit."""
    of_block = channels * (2 * (STAGES * (n_grads + 2) + OUT_STAGES) + 4)
    blocks = multiprocessors * max(1, min(MOST_BLOCKS, SHARED // of_block))
    return Plan(rows, channels, min(rows, blocks), n_grads, eps)


def _body(plan: Plan, x_g, w_g, beside_g, *refs):
    grads_g, (dx_g, dw_g) = refs[: plan.n_grads], refs[plan.n_grads :]
    block = lax.axis_index("blocks")
    count = (plan.rows - block + plan.blocks - 1) // plan.blocks  # rows block, block + blocks, ...
    row = lambda i: block + i * plan.blocks
    arrays = x_g, beside_g, *grads_g

    def scoped(in_s, out_s, w_s, full, of_weights):
        def fetch(i):
            slot = lax.rem(i, STAGES)
            for k, array in enumerate(arrays):
                plgpu.copy_gmem_to_smem(array.at[row(i)], in_s.at[slot, k], full.at[slot])

        def step(i, dw):
            slot, out = lax.rem(i, STAGES), lax.rem(i, OUT_STAGES)
            plgpu.barrier_wait(full.at[slot])
            load = lambda k: plgpu.load(in_s.at[slot, k], layout=plan.layout).astype(F32)
            x, beside, dn = load(0), load(1), load(2)
            for k in range(1, plan.n_grads):
                dn += load(2 + k)
            u = dn * plgpu.load(w_s, layout=plan.layout)
            square, across = jnp.sum(x * x), jnp.sum(u * x)
            root = lax.rsqrt(square * (1.0 / plan.channels) + plan.eps)
            mean = root * root * root * across * (1.0 / plan.channels)
            plgpu.wait_smem_to_gmem(OUT_STAGES - 1, wait_read_only=True)
            plgpu.commit_smem()  # all have waited: nobody writes what is still read
            out_s[out] = (u * root - x * mean + beside).astype(dx_g.dtype)
            plgpu.commit_smem()  # all have read the slot, too
            plgpu.copy_smem_to_gmem(out_s.at[out], dx_g.at[row(i)])
            pl.when(i + STAGES < count)(lambda: fetch(i + STAGES))
            return dw + dn * x * root

        plgpu.copy_gmem_to_smem(w_g, w_s, of_weights)
        for i in range(STAGES):
            pl.when(i < count)(functools.partial(fetch, i))
        plgpu.barrier_wait(of_weights)
        nothing = plgpu.layout_cast(jnp.full(plan.shape, 0.0, F32), plan.layout)
        dw = lax.fori_loop(0, count, step, nothing)
        w_s[...] = dw
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(w_s, dw_g.at[block])
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        scoped,
        plgpu.SMEM((STAGES, len(arrays), *plan.shape), x_g.dtype),
        plgpu.SMEM((OUT_STAGES, *plan.shape), dx_g.dtype),
        plgpu.SMEM(plan.shape, F32),
        plgpu.Barrier(num_arrivals=len(arrays), num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=1),
    )


@functools.partial(jax.jit, static_argnums=(0,))
def rms_norm_gradients(plan: Plan, x_RC, weight_C, beside_RC, *grads_RC):
    """(dx, the gradient of the weights by thread block, [N, C] float32)."""
    shape, of_rows = x_RC.shape, (plan.rows, *plan.shape)
    kernel = plgpu.kernel(
        named_body("rms_norm_gradients", _body, plan),
        out_type=[
            jax.ShapeDtypeStruct(of_rows, jnp.bfloat16), jax.ShapeDtypeStruct((plan.blocks, *plan.shape), F32),
        ],
        grid=(plan.blocks,),
        grid_names=("blocks",),
        compiler_params=LANE_PARAMS,
    )  # fmt: skip
    x, beside, *grads = (a.reshape(of_rows) for a in (x_RC, beside_RC, *grads_RC))
    arrays = x, weight_C.reshape(plan.shape), beside, *grads
    dx, dw = call_varying(jax.custom_batching.sequential_vmap(kernel), *arrays)
    return dx.reshape(shape), dw.reshape(plan.blocks, plan.channels)
