# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernels that walk along rows and need sums over each: the frame of the gradients of norms.

A thread block is one warpgroup, whose four warps share the rows that it has at a time: where each has one of its own,
sums over a row are shuffles and no warp waits for another. Rows come through a ring in shared memory. They are read
from there in pieces, and once more when their sums are known. Letters: R rows, C channels, N thread blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platform
from pallas_kernels.mosaic_gpu import F32, over_blocks
from pallas_kernels.varying import call_varying

THREADS = 128
"""Of a block."""
MOST_COLUMNS = 256
"""That a copy takes along a dim."""
STAGES = 2
"""Slots of the ring."""
SHARED, OWN = 220 * 1024, 3072
"""Bytes of shared memory of a multiprocessor for thread blocks, and of them what each has beside its plan: for sums
over warps, barriers and the system."""
MOST_BLOCKS = 6
"""Thread blocks of a multiprocessor."""
AT_ONCE = (4, 2, 1)
"""Rows that a thread block may have at a time."""


class Plan(NamedTuple):
    """Static description of a kernel."""

    name: str
    """That profiles show."""
    rows: int
    channels: int
    n_in: int
    """Arrays [rows, channels] that are read, and that are written."""
    n_out: int
    multiprocessors: int
    at_once: int
    """Rows: four warps share them."""

    @property
    def piece(self) -> int:
        """Channels of a row that its warps read at a time."""
        return THREADS * self.width // self.at_once

    @property
    def width(self) -> int:
        """Neighbours of them that a thread has."""
        return min(4, MOST_COLUMNS * self.at_once // THREADS)

    @property
    def pieces(self) -> int:
        return self.channels // self.piece

    @property
    def bytes(self) -> int:
        """Of shared memory that a thread block has."""
        return self.channels * (2 * self.at_once * (STAGES * self.n_in + 2 * self.n_out) + 4)

    @property
    def blocks(self) -> int:
        return min(self.rows // self.at_once, max(1, self.side_by_side) * self.multiprocessors)

    @property
    def side_by_side(self) -> int:
        """Thread blocks that a multiprocessor has room for."""
        return min(MOST_BLOCKS, SHARED // (self.bytes + OWN))

    @property
    def shape(self) -> tuple[int, int]:
        """Of a piece of the rows."""
        return self.at_once, self.piece

    @property
    def layout(self):
        tiles = Tiling((self.shape, (1, 32 * self.width), (1, self.width)))
        layout = mgpu.TiledLayout(tiles, (-6, -5), (-3,), -1, _check_canonical=False).canonicalize()
        return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)

    def full(self, value):
        """A piece of one number."""
        return plgpu.layout_cast(jnp.full(self.shape, value, F32), self.layout)

    def over(self, numbers):
        """A number a row, as a piece."""
        return plgpu.layout_cast(lax.broadcast_in_dim(numbers, self.shape, (0,)), self.layout)

    def means(self, square, across, eps: float):
        """Of rows whose pieces' squares and products with their gradients add up so: 1 / rms, and what the gradient
        loses of the row; as pieces."""
        root = lax.rsqrt(jnp.sum(square, axis=1) * (1.0 / self.channels) + eps)
        mean = root * root * root * jnp.sum(across, axis=1) * (1.0 / self.channels)
        return self.over(root), self.over(mean)

    def load(self, ref):
        """A piece of rows as float32."""
        return plgpu.load(ref, layout=self.layout).astype(F32)

    def load_for_all(self, ref):
        """A piece of what is the same for all rows."""
        piece = plgpu.load(ref, layout=self.layout.reduce(0))
        return plgpu.layout_cast(lax.broadcast_in_dim(piece, self.shape, (1,)), self.layout)


def make_plan(name: str, rows: int, channels: int, n_in: int, n_out: int) -> Plan:
    """That of which as many rows are taken at a time as leave room for two thread blocks or more."""
    plans = [Plan(name, rows, channels, n_in, n_out, platform.multiprocessors(), n) for n in AT_ONCE]
    fits = lambda plan: plan.side_by_side > 1 and not channels % plan.piece and not rows % plan.at_once
    return next(filter(fits, plans), plans[-1])


def _body(plan: Plan, of_rows, *refs):
    ins, weight_g, outs, sums_g = refs[: plan.n_in], refs[plan.n_in], refs[plan.n_in + 1 : -1], refs[-1]
    block = lax.axis_index("blocks")
    count = (plan.rows // plan.at_once - block + plan.blocks - 1) // plan.blocks
    tile = lambda i: pl.ds((block + i * plan.blocks) * plan.at_once, plan.at_once)

    def scoped(in_s, out_s, weight_s, arrived, of_weight):
        def fetch(i):
            slot = lax.rem(i, STAGES)
            for k, array in enumerate(ins):
                plgpu.copy_gmem_to_smem(array.at[tile(i)], in_s.at[slot, k], arrived.at[slot])

        def step(i, sums):
            slot, out = lax.rem(i, STAGES), lax.rem(i, 2)
            plgpu.wait_smem_to_gmem(plan.n_out, wait_read_only=True)  # all threads: nobody writes what is still read
            plgpu.barrier_wait(arrived.at[slot])
            read = lambda k, piece: plan.load(in_s.at[slot, k, :, piece])

            def write(k, piece, value):
                out_s.at[out, k, :, piece][...] = value.astype(out_s.dtype)

            sums = of_rows(plan, read, lambda piece: plan.load_for_all(weight_s.at[piece]), write, sums)
            plgpu.commit_smem()  # all have read the slot, too
            for k, array in enumerate(outs):
                plgpu.copy_smem_to_gmem(out_s.at[out, k], array.at[tile(i)])
            pl.when(i + STAGES < count)(lambda: fetch(i + STAGES))
            return sums

        plgpu.copy_gmem_to_smem(weight_g, weight_s, of_weight)
        for i in range(STAGES):
            pl.when(i < count)(functools.partial(fetch, i))
        plgpu.barrier_wait(of_weight)
        sums = lax.fori_loop(0, count, step, (plan.full(0.0),) * plan.pieces)
        plgpu.wait_smem_to_gmem(0)
        for piece, total in enumerate(sums):
            weight_s.at[piece][...] = jnp.sum(total, axis=0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(weight_s, sums_g.at[block])
        plgpu.wait_smem_to_gmem(0)

    shape = (plan.at_once, plan.pieces, plan.piece)
    pl.run_scoped(
        scoped,
        plgpu.SMEM((STAGES, plan.n_in, *shape), ins[0].dtype),
        plgpu.SMEM((2, plan.n_out, *shape), outs[0].dtype),
        plgpu.SMEM(shape[1:], F32),
        plgpu.Barrier(num_arrivals=plan.n_in, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=1),
    )


def walk(plan: Plan, of_rows, arrays_RC: list[jax.Array], weight_C: jax.Array) -> list[jax.Array]:
    """Arrays [R, C] and, last, sums over rows, [C], float32, that `of_rows` makes of others [R, C] and of a weight.

    of_rows: (plan, read, weight, write, sums) -> sums, of the rows that a thread block has at a time: read(k, p) and
    weight(p) give piece p, `plan.shape`, in float32, write(k, p, value) takes that of the k-th result; sums: a piece
    each, to which is added what is summed over rows.
    """
    shape = (plan.rows, plan.pieces, plan.piece)
    like = jax.ShapeDtypeStruct(shape, arrays_RC[0].dtype)
    out_type = [like] * plan.n_out + [jax.ShapeDtypeStruct((plan.blocks, *shape[1:]), F32)]
    kernel = over_blocks(plan.name, functools.partial(_body, plan, of_rows), plan.blocks, out_type)
    arrays = [a.reshape(shape) for a in arrays_RC]
    *made, sums = call_varying(jax.custom_batching.sequential_vmap(kernel), *arrays, weight_C.reshape(shape[1:]))
    return [*(a.reshape(plan.rows, plan.channels) for a in made), sums.sum(0).reshape(-1)]
