# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel of exponentials of products and their sums: the products themselves are never stored.

A thread block owns 128 rows, 64 a compute warpgroup, and walks along all columns, 256 at a time, whose sums and the
largest of each row stay in registers. A producer warpgroup streams blocks of 64 of the summed axis through shared
memory. A row is known to fit its base only at its end: where a sum has become too large, all is walked again, each such
row beside its largest.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exponentials.kernel import LARGEST
from pallas_kernels.mosaic_gpu import (
    BF16_TRANSFORMS,
    F32,
    LANE_PARAMS,
    LOG2E,
    ROW,
    TILE,
    accumulate,
    drain,
    loop_with,
    named_body,
    rows_of,
)
from pallas_kernels.varying import call_varying

ROWS, COLUMNS = 2 * TILE, 256
"""Of a tile."""
STAGES, SLOTS = 4, 2
REGISTERS = (240, 24)
"""Of a thread of the compute warpgroups and of the producer."""


class Plan(NamedTuple):
    """Static description of a kernel."""

    rows: int
    inputs: int
    columns: int
    factor: float

    @property
    def tiles(self) -> int:
        """Along the columns; the last ends with them and repeats some of the one before."""
        return -(-self.columns // COLUMNS)

    @property
    def repeated(self) -> int:
        return -self.columns % COLUMNS

    @property
    def steps(self) -> int:
        """Of a tile."""
        return self.inputs // TILE


def _columns(plan: Plan, tile):
    return jnp.minimum(tile * COLUMNS, plan.columns - COLUMNS)


def _compute(plan: Plan, refs, smem, bars, wg, row):
    (a_s, b_s, out_s, vector_s, again_s), (full, empty, given, decided) = smem, bars

    def tile_sums(first):
        """The products of a tile."""

        def step(k, acc):
            at = first + k
            slot = lax.rem(at, STAGES)
            plgpu.barrier_wait(full.at[slot])
            plgpu.wgmma(acc, a_s.at[slot, wg], b_s.at[slot].T)
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(empty.at[lax.rem(at - 1, STAGES)]))

        def sums(acc):
            loop_with(acc, plan.steps, step)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(empty.at[lax.rem(first + plan.steps - 1, STAGES)])
            return acc[...]

        return accumulate(sums, COLUMNS)

    def tile(before, base, i, carry):
        """One more tile, `before` behind the first: (sums, largest) of each row, in units of log2."""
        total, largest = carry
        z = tile_sums((before + i) * plan.steps) * (plan.factor * LOG2E)
        start = _columns(plan, i)
        for number, column in enumerate(range(0, COLUMNS, TILE)):
            part = z[:, column : column + TILE]
            e = jnp.exp2(part - rows_of(base))
            plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)  # what the slot held before has left it
            out_s[wg, number % SLOTS] = e.astype(out_s.dtype)
            plgpu.commit_smem()
            target = refs["e"].at[pl.ds(row, TILE), pl.ds(start + column, TILE)]
            plgpu.copy_smem_to_gmem(out_s.at[wg, number % SLOTS], target)
            new = jnp.where((i == plan.tiles - 1) & (column < plan.repeated), 0.0, 1.0)  # of all columns of the part
            total, largest = total + new * jnp.sum(e, axis=1), jnp.maximum(largest, jnp.max(part, axis=1))
        return total, largest

    def save(total, base):
        plgpu.wait_smem_to_gmem(0)
        vector_s[wg, 0], vector_s[wg, 1] = total, base * (1 / LOG2E)
        plgpu.commit_smem()
        for k, name in enumerate(("sums", "bases")):
            plgpu.copy_smem_to_gmem(vector_s.at[wg, k], refs[name].at[pl.ds(row, TILE)])
        plgpu.wait_smem_to_gmem(0)

    def decide():
        """Whether all is walked again: both warpgroups do, for they share what is fetched."""
        most = lax.fori_loop(0, TILE, lambda i, most: jnp.maximum(most, vector_s[wg, 0, i]), jnp.float32(0.0))
        again_s[wg] = jnp.where(most < LARGEST, 0, 1)
        plgpu.commit_smem()
        plgpu.barrier_arrive(decided)
        plgpu.barrier_wait(decided)

    def walk(number, carry):
        base, wanted = carry
        vector = lambda value: plgpu.layout_cast(jnp.full((TILE,), value, F32), ROW)
        each = functools.partial(tile, number * plan.tiles, base)
        total, largest = lax.fori_loop(0, wanted * plan.tiles, each, (vector(0.0), vector(-jnp.inf)))
        pl.when(wanted > 0)(lambda: save(total, base))
        pl.when(number == 0)(decide)
        return jnp.where(total < LARGEST, base, largest), jnp.minimum(again_s[0] + again_s[1], 1)

    def start():
        plgpu.copy_gmem_to_smem(refs["base"].at[pl.ds(row, TILE)], vector_s.at[wg, 0], given.at[wg])
        plgpu.barrier_wait(given.at[wg])
        return plgpu.load(vector_s.at[wg, 0], layout=ROW) * LOG2E, jnp.int32(1)

    lax.fori_loop(0, 2, walk, start())


def _produce(plan: Plan, refs, smem, bars, first_row):
    (a_s, b_s, _, _, again_s), (full, empty, _, decided) = smem, bars

    def walk(number, wanted):
        def tile(i, _):
            columns = pl.ds(_columns(plan, i), COLUMNS)

            def step(k, _):
                at = (number * plan.tiles + i) * plan.steps + k
                slot = lax.rem(at, STAGES)

                @pl.when(at >= STAGES)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                inner = pl.ds(k * TILE, TILE)
                for half in range(2):
                    rows = pl.ds(first_row + half * TILE, TILE)
                    plgpu.copy_gmem_to_smem(refs["x"].at[rows, inner], a_s.at[slot, half], full.at[slot])
                plgpu.copy_gmem_to_smem(refs["w"].at[columns, inner], b_s.at[slot], full.at[slot])

            lax.fori_loop(0, plan.steps, step, None)

        lax.fori_loop(0, wanted * plan.tiles, tile, None)
        pl.when(number == 0)(lambda: plgpu.barrier_wait(decided))
        return jnp.minimum(again_s[0] + again_s[1], 1)

    again = lax.fori_loop(0, 2, walk, jnp.int32(1))
    drain((1 + again) * plan.tiles * plan.steps, STAGES, (empty,))


def _body(plan: Plan, x_g, w_g, base_g, e_g, sums_g, bases_g):
    refs = {"x": x_g, "w": w_g, "base": base_g, "e": e_g, "sums": sums_g, "bases": bases_g}
    wg, first = lax.axis_index("wg"), lax.axis_index("rows") * ROWS
    tile = functools.partial(plgpu.SMEM, dtype=x_g.dtype, transforms=BF16_TRANSFORMS)
    scratch = [
        tile((STAGES, 2, TILE, TILE)), tile((STAGES, COLUMNS, TILE)), tile((2, SLOTS, TILE, TILE)),
        plgpu.SMEM((2, 2, TILE), F32), plgpu.SMEM((2,), jnp.int32),
    ]  # fmt: skip

    def scoped(smem, *bars):
        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            _compute(plan, refs, smem, bars, wg, first + wg * TILE)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(REGISTERS[1], action="decrease")
            _produce(plan, refs, smem, bars, first)

    pl.run_scoped(
        scoped,
        scratch,
        plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
        plgpu.Barrier(num_arrivals=2),
        collective_axes="wg",
    )


@functools.partial(jax.jit, static_argnums=(0,))
def product_exponentials(plan: Plan, x_RD, w_VD, base_R):
    """See `pallas_kernels.exponentials.product_exponentials`."""
    of_rows = jax.ShapeDtypeStruct((plan.rows,), F32)
    kernel = plgpu.kernel(
        named_body("product_exponentials", _body, plan),
        out_type=[jax.ShapeDtypeStruct((plan.rows, plan.columns), x_RD.dtype), of_rows, of_rows],
        grid=(plan.rows // ROWS,),
        grid_names=("rows",),
        num_threads=3,
        thread_name="wg",
        compiler_params=dataclasses.replace(LANE_PARAMS, reduction_scratch_bytes=0),
    )
    return tuple(call_varying(jax.custom_batching.sequential_vmap(kernel), x_RD, w_VD, base_R))
