# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel of exponentials of products and their sums: the products themselves are never stored.

Tiles are 128 rows and 256 columns, 64 rows a compute warpgroup; a producer warpgroup streams blocks of 64 of the summed
axis through shared memory. Two thread blocks of a cluster take tiles below each other and share what is fetched of the
columns. All that run at once are near each other, a few rows high, so that the L2 cache holds what they read: were each
thread block to keep its rows, those of 16,384 of 2,048 would be 67 MB, fetched anew for every 256 columns.

Each tile writes down the sums and the largest of its rows. A row is known to fit its base only when all of its tiles
are done: where a sum has become too large, a second call does the rows of its cluster again, in place, each such row
beside its largest. Mostly it finds nothing to do.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

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
    drain,
    named_body,
    ring_sums,
    rows_of,
    stream,
)
from pallas_kernels.varying import call_varying

ROWS, COLUMNS = 2 * TILE, 256
"""Of a tile."""
CLUSTER = 2
"""Thread blocks, each with rows of its own."""
HEIGHT = 8
"""Clusters' rows below each other that are done at once, all columns of them before the next."""
STAGES, SLOTS = 4, 2
FEW_INPUTS = 1024
"""With as many or fewer, parts of a tile meet lane by lane, and lanes once a tile: one H100, 16,384 rows, 50,304
columns, 768 inputs in 2.22 for 2.31 ms; 2,048 inputs in 5.19 for 4.94 (2026-11-28)."""
REGISTERS = (240, 24)
"""Of a thread of the compute warpgroups and of the producer."""


class Plan(NamedTuple):
    """Static description of a kernel."""

    rows: int
    inputs: int
    columns: int
    factor: float
    multiprocessors: int

    @property
    def across(self) -> int:
        """Tiles along the columns; the last ends with them and repeats some of the one before."""
        return -(-self.columns // COLUMNS)

    @property
    def repeated(self) -> int:
        return -self.columns % COLUMNS

    @property
    def down(self) -> int:
        """Clusters' tiles along the rows."""
        return self.rows // (CLUSTER * ROWS)

    @property
    def steps(self) -> int:
        """Of a tile."""
        return self.inputs // TILE

    @property
    def clusters(self) -> int:
        """At once."""
        return min(max(self.multiprocessors // CLUSTER, 1), self.down * self.across)


def _place(plan: Plan, tile):
    """(cluster's tile along the rows, tile along the columns) of the number of a cluster's tile."""
    before = tile // (HEIGHT * plan.across)
    height = jnp.minimum(HEIGHT, plan.down - before * HEIGHT)
    within = tile - before * (HEIGHT * plan.across)
    column = within // height
    return before * HEIGHT + within - column * height, column


def _walk(plan: Plan, wanted_g, work) -> jax.Array:
    """`work(row of tiles, column of tiles, steps before)` for a cluster's tiles; of all of them, the steps. wanted: of
    which rows; None: of all."""
    cluster = lax.axis_index("cluster")

    def tile(i, at):
        row, column = _place(plan, cluster + i * plan.clusters)
        if wanted_g is None:
            work(row, column, at)
            return at + plan.steps
        wanted = wanted_g[row]
        pl.when(wanted > 0)(lambda: work(row, column, at))
        return at + wanted * plan.steps

    count = (plan.down * plan.across - cluster + plan.clusters - 1) // plan.clusters
    return lax.fori_loop(0, count, tile, jnp.int32(0))


def _start(plan: Plan, column):
    """The first column of a tile."""
    return jnp.minimum(column * COLUMNS, plan.columns - COLUMNS)


def _compute(plan: Plan, refs, smem, bars, wg):
    (a_s, b_s, out_s, base_s, found_s), (full, empty, given) = smem, bars

    def multiply(acc, slot):
        plgpu.wgmma(acc, a_s.at[slot, wg], b_s.at[slot].T)

    def tile(down, across, at):
        """Its exponentials, and (sums, largest) of each row, the latter in units of log2."""
        rows = pl.ds((down * CLUSTER + lax.axis_index("block")) * ROWS + wg * TILE, TILE)
        plgpu.copy_gmem_to_smem(refs["base"].at[rows], base_s.at[wg], given.at[wg])
        z = ring_sums(multiply, at, plan.steps, STAGES, (full, empty), COLUMNS)
        plgpu.barrier_wait(given.at[wg])
        base = plgpu.load(base_s.at[wg], layout=ROW) * LOG2E
        start, total, largest = _start(plan, across), None, None
        once = plan.inputs <= FEW_INPUTS
        for number, column in enumerate(range(0, COLUMNS, TILE)):
            part = z[:, column : column + TILE] * (plan.factor * LOG2E)
            e = jnp.exp2(part - rows_of(base))
            plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)  # what the slot held before has left it
            out_s[wg, number % SLOTS] = e.astype(out_s.dtype)
            plgpu.commit_smem()
            target = refs["e"].at[rows, pl.ds(start + column, TILE)]
            plgpu.copy_smem_to_gmem(out_s.at[wg, number % SLOTS], target)
            sums, most = (e, part) if once else (jnp.sum(e, axis=1), jnp.max(part, axis=1))
            if column < plan.repeated:  # all of the part
                sums *= jnp.where(across == plan.across - 1, 0.0, 1.0)
            total, largest = (sums, most) if total is None else (total + sums, jnp.maximum(largest, most))
        if once:
            total, largest = jnp.sum(total, axis=1), jnp.max(largest, axis=1)
        found_s[wg, 0], found_s[wg, 1] = total, largest  # the copy of before is one of those that were waited for
        plgpu.commit_smem()  # all have read the base, too
        plgpu.copy_smem_to_gmem(found_s.at[wg], refs["found"].at[across, :, rows])

    _walk(plan, refs["wanted"], tile)
    plgpu.wait_smem_to_gmem(0)


def _produce(plan: Plan, refs, smem, bars):
    (a_s, b_s, *_), (full, empty, _) = smem, bars

    def tile(down, across, first):
        row, columns = (down * CLUSTER + lax.axis_index("block")) * ROWS, pl.ds(_start(plan, across), COLUMNS)

        def fetch(slot, inner):
            plgpu.copy_gmem_to_smem(refs["w"].at[columns, inner], b_s.at[slot], full.at[slot], collective_axes="block")

        stream(refs["x"], row, a_s, fetch, first, plan.steps, (full, empty))

    steps = _walk(plan, refs["wanted"], tile)
    drain(steps, STAGES, (empty,))  # so the other thread block is there until nothing is sent to it


def _body(plan: Plan, names, *given):
    refs: dict[str, Any] = {"wanted": None} | dict(zip(names, given, strict=True))
    wg = lax.axis_index("wg")
    tile = functools.partial(plgpu.SMEM, dtype=refs["x"].dtype, transforms=BF16_TRANSFORMS)
    scratch = [
        tile((STAGES, 2, TILE, TILE)), tile((STAGES, COLUMNS, TILE)), tile((2, SLOTS, TILE, TILE)),
        plgpu.SMEM((2, TILE), F32), plgpu.SMEM((2, 2, TILE), F32),
    ]  # fmt: skip

    def scoped(smem, *bars):
        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            _compute(plan, refs, smem, bars, wg)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(REGISTERS[1], action="decrease")
            _produce(plan, refs, smem, bars)

    pl.run_scoped(
        scoped,
        scratch,
        plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=2, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
        collective_axes="wg",
    )


def _kernel(plan: Plan, name: str, names, out_type):
    return pl.kernel(
        named_body(name, _body, plan, names),
        out_type=out_type,
        mesh=plgpu.Mesh(
            grid=(plan.clusters,), grid_names=("cluster",), cluster=(CLUSTER,), cluster_names=("block",),
            num_threads=3, thread_name="wg",
        ),
        compiler_params=dataclasses.replace(LANE_PARAMS, reduction_scratch_bytes=0),
        name=name,
    )  # fmt: skip


def _call(plan: Plan, x_RD, w_VD, base_R):
    """(exponentials, their sums, bases). Of each tile's rows, `found` has the sums and the largest."""
    shapes = ((plan.rows, plan.columns), x_RD.dtype), ((plan.across, 2, plan.rows), F32)
    outs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    names = ["x", "w", "base", "e", "found"]
    e_RV, found = _kernel(plan, "product_exponentials", names, outs)(x_RD, w_VD, base_R)
    fit_R = found[:, 0].sum(0) < LARGEST
    base_R = jnp.where(fit_R, base_R, found[:, 1].max(0) * (1 / LOG2E))
    wanted = jnp.logical_not(fit_R.reshape(plan.down, -1).all(1)).astype(jnp.int32)
    in_place = jax.new_ref(e_RV), jax.new_ref(found)
    names = ["x", "w", "base", "wanted", "e", "found"]
    _kernel(plan, "product_exponentials_again", names, [])(x_RD, w_VD, base_R, wanted, *in_place)
    e_RV, found = map(jax.freeze, in_place)
    return e_RV, found[:, 0].sum(0), base_R


@functools.partial(jax.jit, static_argnums=(0,))
def product_exponentials(plan: Plan, x_RD, w_VD, base_R):
    """See `pallas_kernels.exponentials.product_exponentials`."""
    call = jax.custom_batching.sequential_vmap(functools.partial(_call, plan))
    return tuple(call_varying(call, x_RD, w_VD, base_R))
