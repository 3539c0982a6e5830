# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernels of the matrix products beside silu(gate) * up, which is made of their sums in registers.

A cluster of thread blocks owns a tile, 128 rows a block by 256 columns, and then others. Two compute warpgroups, of 64
rows each, multiply what a producer warpgroup streams through a ring in shared memory, 64 of the summed axis at a time;
columns are fetched once for the cluster. The second warpgroup starts some steps behind the first and stays there: while
one makes what is stored of its sums, the other has the matrix unit.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import (
    BF16_TRANSFORMS,
    F32,
    LANE_PARAMS,
    LOG2E,
    TILE,
    WGMMA,
    drain,
    load_tile,
    named_body,
    ring_sums,
    stream,
)
from pallas_kernels.varying import call_varying

ROWS, COLUMNS = 2 * TILE, 256
"""Of a thread block's tile of products."""
HALF = COLUMNS // 2
PAIR_TRANSFORMS = (plgpu.TilingTransform((8, 1, 64)), BF16_TRANSFORMS[1])
"""Of [64, 2, 128] as it lies in memory as [64, 256] of BF16_TRANSFORMS does."""
WARPGROUPS = 3
"""Of a thread block."""
REGISTERS = (240, 24)
"""Of a thread of the compute warpgroups and of the producer."""
CLUSTER = 2
"""Thread blocks that share columns."""
STAGES = 3
"""Of the ring of operands."""
SLOTS = 5
"""Of what is stored: of `gated_products` of a warpgroup, of `hidden_gradients` of both."""
PANEL = 8
"""Clusters' tiles along rows that are walked through before the next columns."""
BEHIND = 2
"""Steps that the second warpgroup starts behind the first."""
PARTS = COLUMNS // TILE
"""Of a warpgroup's tile of gradients: h comes and goes by them."""


class Plan(NamedTuple):
    """Static description of a kernel."""

    rows: int
    inputs: int
    width: int
    clusters: int
    """All at work at once."""

    @property
    def steps(self) -> int:
        """Of a tile."""
        return self.inputs // TILE


def plan_for(n_rows: int, n_inputs: int, width: int, multiprocessors: int) -> Plan:
    """Of products [n_rows, n_inputs] x [n_inputs, width]."""
    return Plan(n_rows, n_inputs, width, multiprocessors // CLUSTER)


class Tiles(NamedTuple):
    """Those of a cluster."""

    plan: Plan
    columns: int
    """Of a tile, of each part of h."""

    @property
    def shape(self) -> tuple[int, int]:
        """Along rows and columns; the last columns' tile ends with them and repeats some of the one before."""
        return self.plan.rows // (ROWS * CLUSTER), -(-self.plan.width // self.columns)

    @property
    def count(self):
        clusters, (m, n) = self.plan.clusters, self.shape
        return (m * n - lax.axis_index("clusters") + clusters - 1) // clusters

    def start(self, i):
        """(first row of the thread block, first column) of the i-th."""
        number = lax.axis_index("clusters") + i * self.plan.clusters
        row, column = plgpu.planar_snake(number, self.shape, 0, min(PANEL, self.shape[0]))
        block = row * CLUSTER + lax.axis_index("cluster")
        return block * ROWS, jnp.minimum(column * self.columns, self.plan.width - self.columns)


def _sums(plan: Plan, multiply, bars, wg, first):
    """A warpgroup's products [64, 256] of a tile whose first step is the ring's `first`."""
    *ring, ahead = bars

    def at_step(at):
        pl.when((at == min(BEHIND, plan.steps - 1)) & (wg == 0))(lambda: plgpu.barrier_arrive(ahead))

    pl.when((first == 0) & (wg == 1))(lambda: plgpu.barrier_wait(ahead))
    return ring_sums(multiply, first, plan.steps, STAGES, ring, COLUMNS, at_step)


def _produce(plan: Plan, tiles: Tiles, x_g, a_s, fetch_columns, bars):
    """Streams the operands of all tiles."""
    *ring, _ = bars

    def tile(i, _):
        row, column = tiles.start(i)
        fetch = functools.partial(fetch_columns, column)
        stream(x_g, row, a_s, fetch, i * plan.steps, plan.steps, ring)

    lax.fori_loop(0, tiles.count, tile, None)
    drain(tiles.count * plan.steps, STAGES, ring[1:])


def _barriers() -> list:
    """(full, empty, ahead)."""
    full = plgpu.Barrier(num_arrivals=3, num_barriers=STAGES)
    empty = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=2, num_barriers=STAGES)
    return [full, empty, plgpu.Barrier()]


def _in_warps(*works):
    """Each in a warp of its own."""
    plgpu.warp_map(lambda warp: [pl.when(warp == number)(work) for number, work in enumerate(works)] and None)


def _joined(views, slot):
    """Both parts' columns in a slot, [64, 256]."""
    return views[1].at[slot]


def _tile(*shape):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=BF16_TRANSFORMS)


def _store(ref, value):
    """ref[...] = value, which would read what was there."""
    plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(BF16_TRANSFORMS)))(_store_tiled)(value, ref)


def _store_tiled(ctx, value, ref):
    value.store_tiled(ref, swizzle=128)


def _sigmoid(gate):
    return 1.0 / (1.0 + jnp.exp2(gate * -LOG2E))


def _store_products(refs, out_s, number, rows, column, wg, z):
    """h and hidden of the number-th tile's products; `rows` and `column` say where."""
    h_g, hidden_g = refs

    def store(first, values, targets):
        """The first-th of a tile's six, and the following."""
        slots = [lax.rem(number * 6 + first + k, SLOTS) for k in range(len(values))]
        plgpu.wait_smem_to_gmem(SLOTS - len(values), wait_read_only=True)  # what these held before has left them
        for slot, value in zip(slots, values, strict=True):
            _store(out_s.at[wg, slot], value)
        plgpu.commit_smem()
        for slot, target in zip(slots, targets, strict=True):
            plgpu.copy_smem_to_gmem(out_s.at[wg, slot], target)

    for k, part in enumerate(range(0, HALF, TILE)):
        # Rounded two numbers at a time: as one number each goes through `astype` where it is used again.
        gate, up = (lax.optimization_barrier(z[:, c + part : c + part + TILE].astype(h_g.dtype)) for c in (0, HALF))
        columns = pl.ds(column + part, TILE)
        store(3 * k, (gate, up), [h_g.at[rows, c, columns] for c in range(2)])
        gate, up = gate.astype(F32), up.astype(F32)
        hidden = gate * _sigmoid(gate) * up
        store(3 * k + 2, (hidden.astype(h_g.dtype),), [hidden_g.at[rows, columns]])


def _products(plan: Plan, x_g, w_g, h_g, hidden_g):
    wg, tiles = lax.axis_index("wg"), Tiles(plan, HALF)

    def scoped(a_s, b_views, out_s, *bars):
        def multiply(acc, slot):
            plgpu.wgmma(acc, a_s.at[slot, wg], _joined(b_views, slot))

        def tile(i, _):
            z = _sums(plan, multiply, bars, wg, i * plan.steps)
            row, column = tiles.start(i)
            _store_products((h_g, hidden_g), out_s, i, pl.ds(row + wg * TILE, TILE), column, wg, z)

        def fetch(column, slot, inner):
            source = w_g.at[inner, pl.ds(0, 2), pl.ds(column, HALF)]
            plgpu.copy_gmem_to_smem(source, b_views[0].at[slot], bars[0].at[slot], collective_axes="cluster")

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            lax.fori_loop(0, tiles.count, tile, None)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg >= 2)
        def _():
            plgpu.set_max_registers(REGISTERS[1], action="decrease")
            _in_warps(lambda: _produce(plan, tiles, x_g, a_s, fetch, bars))

    pl.run_scoped(
        scoped,
        _tile(STAGES, 2, TILE, TILE),
        plgpu.RefUnion(
            plgpu.SMEM((STAGES, TILE, 2, HALF), jnp.bfloat16, transforms=PAIR_TRANSFORMS),
            _tile(STAGES, TILE, COLUMNS),
        ),
        _tile(2, SLOTS, TILE, TILE),
        *_barriers(),
        collective_axes="wg",
    )


def _make_gradients(h_s, bars, number, wg, z):
    """Of h where it lies, of the number-th tile's products."""
    arrived, made = bars
    for part in range(PARTS):
        own, d = wg * PARTS + part, z[:, part * TILE : (part + 1) * TILE]
        slot = lax.rem(number * 2 * PARTS + own, SLOTS)
        plgpu.barrier_wait(arrived.at[own])
        gate, up = (load_tile(h_s.at[slot, k]) for k in range(2))
        sigmoid = _sigmoid(gate)
        d_gate = d * sigmoid
        d_up = d_gate * gate
        d_gate = up * (d_gate + d_up * (1.0 - sigmoid))
        for k, value in enumerate((d_gate, d_up)):
            _store(h_s.at[slot, k], value.astype(jnp.bfloat16))
        plgpu.commit_smem()
        plgpu.barrier_arrive(made.at[own])


def _move(tiles: Tiles, h_g, dh_g, h_s, bars):
    """Brings h and takes its gradient away, the first warpgroup's parts of a tile and then the second's."""
    (arrived, made), each = bars, 2 * PARTS

    def place(ref, use, k):
        tile, part = lax.div(use, each), lax.rem(use, each)
        row, column = tiles.start(tile)
        rows = pl.ds(row + lax.div(part, PARTS) * TILE, TILE)
        return ref.at[rows, k, pl.ds(column + lax.rem(part, PARTS) * TILE, TILE)]

    def step(use, _):
        slot, last = lax.rem(use, SLOTS), use - SLOTS

        @pl.when(last >= 0)
        def _():
            plgpu.barrier_wait(made.at[lax.rem(last, each)])
            for k in range(2):
                plgpu.copy_smem_to_gmem(h_s.at[slot, k], place(dh_g, last, k))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(use < tiles.count * each)
        def _():
            for k in range(2):
                plgpu.copy_gmem_to_smem(place(h_g, use, k), h_s.at[slot, k], arrived.at[lax.rem(use, each)])

    lax.fori_loop(0, tiles.count * each + SLOTS, step, None)
    plgpu.wait_smem_to_gmem(0)


def _gradients(plan: Plan, dy_g, w_g, h_g, dh_g):
    wg, tiles = lax.axis_index("wg"), Tiles(plan, COLUMNS)

    def scoped(a_s, b_s, h_s, full, empty, ahead, *own_bars):
        bars = full, empty, ahead

        def multiply(acc, slot):
            plgpu.wgmma(acc, a_s.at[slot, wg], b_s.at[slot].T)

        def tile(i, _):
            _make_gradients(h_s, own_bars, i, wg, _sums(plan, multiply, bars, wg, i * plan.steps))

        def fetch(column, slot, inner):
            plgpu.copy_gmem_to_smem(
                w_g.at[pl.ds(column, COLUMNS), inner], b_s.at[slot], full.at[slot], collective_axes="cluster"
            )

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            lax.fori_loop(0, tiles.count, tile, None)

        @pl.when(wg >= 2)
        def _():
            plgpu.set_max_registers(REGISTERS[1], action="decrease")
            _in_warps(
                lambda: _produce(plan, tiles, dy_g, a_s, fetch, bars),
                lambda: _move(tiles, h_g, dh_g, h_s, own_bars),
            )

    pl.run_scoped(
        scoped,
        _tile(STAGES, 2, TILE, TILE),
        _tile(STAGES, COLUMNS, TILE),
        _tile(SLOTS, 2, TILE, TILE),
        *_barriers(),
        # Of parts, not of slots: a barrier is waited for by one, each time.
        plgpu.Barrier(num_arrivals=2, num_barriers=2 * PARTS),
        plgpu.Barrier(num_barriers=2 * PARTS),
        collective_axes="wg",
    )


def _kernel(name: str, body, plan: Plan, out_type):
    return plgpu.kernel(
        named_body(name, body, plan),
        out_type=out_type,
        grid=(plan.clusters,),
        grid_names=("clusters",),
        cluster=(CLUSTER,),
        cluster_names=("cluster",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        compiler_params=dataclasses.replace(LANE_PARAMS, reduction_scratch_bytes=0),
    )


@functools.partial(jax.jit, static_argnums=(0,))
def gated_products(plan: Plan, x_RD, w_DcF):
    """See `pallas_kernels.gated_product.gated_products`."""
    shapes = (plan.rows, 2, plan.width), (plan.rows, plan.width)
    kernel = _kernel("gated_products", _products, plan, [jax.ShapeDtypeStruct(s, x_RD.dtype) for s in shapes])
    return tuple(call_varying(jax.custom_batching.sequential_vmap(kernel), x_RD, w_DcF))


@functools.partial(jax.jit, static_argnums=(0,))
def hidden_gradients(plan: Plan, dy_RD, w_FD, h_RcF):
    """See `pallas_kernels.gated_product.hidden_gradients`."""
    out = jax.ShapeDtypeStruct((plan.rows, 2, plan.width), dy_RD.dtype)
    kernel = _kernel("hidden_gradients", _gradients, plan, out)
    return call_varying(jax.custom_batching.sequential_vmap(kernel), dy_RD, w_FD, h_RcF)
