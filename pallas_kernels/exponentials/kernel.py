# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel of exponentials and their sums.

A thread block is one warpgroup that owns a few rows and walks along their columns: tiles come through a ring in shared
memory, sums and the largest of each row stay in registers, two columns a thread. A row is known to fit its base only
at its end: where a sum has become too large, the rows are walked again, each such one beside its largest.
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

STAGES = 5
LARGEST = 2.0**100
"""Of a sum: exponentials and what is made of them stay far from float32's largest number."""


class Plan(NamedTuple):
    """Static description of a kernel."""

    rows: int
    columns: int
    block: int
    """Rows of a thread block."""
    width: int
    """Columns of a tile."""
    factor: float

    @property
    def steps(self) -> int:
        return -(-self.columns // self.width)

    @property
    def layout(self):
        return plgpu.Layout.WG_STRIDED((self.width,), vec_size=2)


def _body(plan: Plan, z_g, base_g, p_g, sums_g, bases_g):
    first = lax.axis_index("rows") * plan.block
    steps, repeated = plan.steps, -plan.columns % plan.width
    full_of = lambda value: plgpu.layout_cast(jnp.full((plan.width,), value, F32), plan.layout)

    def tile(i):
        """The last tile ends with the columns: it repeats some of the one before, of which the same is written."""
        start = jnp.minimum(i * plan.width, plan.columns - plan.width)
        return pl.ds(first, plan.block), pl.ds(start, plan.width)

    def scoped(z_s, p_s, full):
        def fetch(i, at):
            slot = lax.rem(at, STAGES)
            plgpu.copy_gmem_to_smem(z_g.at[tile(i)], z_s.at[slot], full.at[slot])

        def walk(begun, bases):
            """Of all columns, `begun` tiles after the first that was fetched: (sums, largest) of each row."""

            def step(i, carry, last=False):
                slot, out = lax.rem(begun + i, STAGES), lax.rem(i, 2)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                plgpu.barrier_wait(full.at[slot])
                sums, largest = [], []
                for r, base in enumerate(bases):
                    z = plgpu.load(z_s.at[slot, r], layout=plan.layout) * (plan.factor * LOG2E)
                    e = jnp.exp2(z - base)
                    p_s[out, r] = e.astype(p_g.dtype)
                    if last and repeated:
                        column = plgpu.broadcasted_iota(jnp.int32, (plan.width,), 0, layout=plan.layout)
                        e = jnp.where(column < repeated, 0.0, e)
                    sums.append(carry[r] + e)
                    largest.append(jnp.maximum(carry[plan.block + r], z))
                plgpu.commit_smem()  # all have read the slot, too
                plgpu.copy_smem_to_gmem(p_s.at[out], p_g.at[tile(i)])
                pl.when(i + STAGES < steps)(lambda: fetch(i + STAGES, begun + i + STAGES))
                return *sums, *largest

            for i in range(min(STAGES, steps)):
                fetch(i, begun + i)
            carry = (*[full_of(0.0)] * plan.block, *[full_of(-jnp.inf)] * plan.block)
            carry = step(steps - 1, lax.fori_loop(0, steps - 1, step, carry), last=True)
            sums = [jnp.sum(a) for a in carry[: plan.block]]
            for r, (total, base) in enumerate(zip(sums, bases, strict=True)):
                sums_g[first + r], bases_g[first + r] = total, base * (1 / LOG2E)
            return sums, [jnp.max(a) for a in carry[plan.block :]]

        bases = [base_g[first + r] * LOG2E for r in range(plan.block)]
        sums, largest = walk(0, bases)
        fit = [total < LARGEST for total in sums]

        @pl.when(jnp.logical_not(functools.reduce(jnp.logical_and, fit)))
        def _():
            plgpu.wait_smem_to_gmem(0)  # what is written again has been written
            walk(steps, [lax.select(*of_row) for of_row in zip(fit, bases, largest, strict=True)])

        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        scoped,
        plgpu.SMEM((STAGES, plan.block, plan.width), F32),
        plgpu.SMEM((2, plan.block, plan.width), p_g.dtype),
        plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
    )


@functools.partial(jax.jit, static_argnums=(0,))
def exponentials(plan: Plan, z_RV, base_R):
    """See `pallas_kernels.exponentials.exponentials`; a base given comes back within rounding."""
    of_rows = jax.ShapeDtypeStruct((plan.rows,), F32)
    kernel = plgpu.kernel(
        named_body("exponentials", _body, plan),
        out_type=[jax.ShapeDtypeStruct(z_RV.shape, jnp.bfloat16), of_rows, of_rows],
        grid=(plan.rows // plan.block,),
        grid_names=("rows",),
        compiler_params=LANE_PARAMS,
    )
    return tuple(call_varying(jax.custom_batching.sequential_vmap(kernel), z_RV, base_R))
