# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernels that walk along rows of heads and need sums over each: the frame of their norms.

A thread block is one warpgroup that walks over rows of its own; they come through a ring in shared memory. Of each
head a few lanes of one warp have both halves, so that sums over it are shuffles and a pair lies in one thread.
Letters: R rows, H heads, P head width, C pairs of a head, N thread blocks.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import F32, over_blocks
from pallas_kernels.varying import call_varying

WARPS, LANES = 4, 32


class Plan(NamedTuple):
    """Static description of a kernel."""

    rows: int
    heads: int
    """The first so many of the arrays."""
    width: int
    eps: float
    factor: float
    """Of the weights."""
    piece: tuple[int, int, int]
    """Rows, heads and pairs that the threads have at a time."""
    tile: int
    """Rows."""
    blocks: int
    stages: int
    """Slots of the ring."""
    apart: bool = True
    """The gradient is an array of its own, not its cotangent's."""

    @property
    def tiles(self) -> int:
        return self.rows // self.tile

    @property
    def pairs(self) -> int:
        return self.width // 2

    @property
    def vector(self) -> int:
        """Neighbours of a head that a thread has, of each half."""
        return math.prod(self.piece) // (WARPS * LANES)

    @property
    def layout(self):
        """Of a piece: each warp has whole heads of it."""
        rows, heads, pairs = self.piece
        of_warp = rows * heads // WARPS
        heads = math.gcd(heads, of_warp)
        tiles = Tiling((self.piece, (of_warp // heads, heads, pairs), (1, 1, self.vector)))
        layout = mgpu.TiledLayout(tiles, (-9, -8), (-6, -5, -4), -1, _check_canonical=False).canonicalize()
        return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)

    def pieces(self):
        """Where they are: slices of rows and of heads."""
        rows, heads, _ = self.piece
        steps = [(r, h) for r in range(0, self.tile, rows) for h in range(0, self.heads, heads)]
        return [(pl.ds(r, rows), pl.ds(h, heads)) for r, h in steps]

    def halves(self, ref, *at):
        """Both halves of a piece of heads, float32."""
        return tuple(self.load(ref.at[(*at, pl.ds(i * self.pairs, self.pairs))]) for i in range(2))

    def load(self, ref):
        return plgpu.load(ref, layout=self.layout, optimized=False).astype(F32)

    def over(self, array, *axes: int):
        """What is the same along these axes, as a piece."""
        dims = tuple(i for i in range(3) if i not in axes)
        return plgpu.layout_cast(lax.broadcast_in_dim(array, self.piece, dims), self.layout)

    def weights(self, ref):
        """Both halves of the weights, as pieces."""
        load = lambda i: plgpu.load(ref.at[i], layout=self.layout.reduce((0, 1)), optimized=False)
        return tuple(self.over(load(i), 0, 1) * self.factor for i in range(2))

    def turn(self, ref, rows):
        """Cosines and sines of a piece."""
        load = lambda i: plgpu.load(ref.at[rows, i], layout=self.layout.reduce((1,)), optimized=False)
        return tuple(self.over(load(i), 1) for i in range(2))

    def root(self, halves):
        """1 / rms of heads, as a piece."""
        first, second = halves
        square = jnp.sum(first * first + second * second, axis=2)
        return self.over(lax.rsqrt(square * (1.0 / self.width) + self.eps), 2)

    def gradients(self, normed, root, grads):
        """Of heads over their rms: halves of x * root, the root, and what reached x * root."""
        across = jnp.sum(grads[0] * normed[0] + grads[1] * normed[1], axis=2) * (1.0 / self.width)
        mean = self.over(across, 2)
        return tuple((grad - half * mean) * root for grad, half in zip(grads, normed, strict=True))


def walk(plan: Plan, ins, weight_g, outs, of_piece, turn_g=(), sums_g=None):
    """Arrays [R, H, P] that `of_piece` makes of others, tile by tile of this thread block.

    of_piece: (halves of each array, weights, turn) -> (halves of each result, halves of what is summed over rows and
    heads, None where sums_g is); turn_g: at most one array [R, 2, C]; sums_g: [N, 2, C], of each thread block.
    """
    block = lax.axis_index("blocks")
    count = (plan.tiles - block + plan.blocks - 1) // plan.blocks
    own = pl.ds(0, plan.heads)
    tile = lambda i: pl.ds((block + i * plan.blocks) * plan.tile, plan.tile)
    shapes = [*[(plan.heads, plan.width)] * len(ins), *(a.shape[1:] for a in turn_g)]

    def scoped(in_s, out_s, weight_s, arrived, of_weight):
        def fetch(i):
            slot = lax.rem(i, plan.stages)
            parts = [*(array.at[tile(i), own] for array in ins), *(array.at[tile(i)] for array in turn_g)]
            for part, shared in zip(parts, in_s, strict=True):
                plgpu.copy_gmem_to_smem(part, shared.at[slot], arrived.at[slot])

        def step(i, sums):
            slot, out = lax.rem(i, plan.stages), lax.rem(i, 2)
            plgpu.wait_smem_to_gmem(len(outs), wait_read_only=True)  # all threads: nobody writes what is still read
            plgpu.barrier_wait(arrived.at[slot])
            for rows, heads in plan.pieces():
                halves = [plan.halves(shared, slot, rows, heads) for shared in in_s[: len(ins)]]
                turn = plan.turn(in_s[-1].at[slot], rows) if turn_g else None
                results, more = of_piece(halves, plan.weights(weight_s), turn)
                for shared, made in zip(out_s, results, strict=True):
                    for half, value in enumerate(made):
                        at = out, rows, heads, pl.ds(half * plan.pairs, plan.pairs)
                        shared.at[at][...] = value.astype(shared.dtype)
                sums = sums if sums_g is None else tuple(map(jnp.add, sums, more))
            plgpu.commit_smem()  # all have read the slot, too
            for shared, array in zip(out_s, outs, strict=True):
                plgpu.copy_smem_to_gmem(shared.at[out], array.at[tile(i), own])
            pl.when(i + plan.stages < count)(lambda: fetch(i + plan.stages))
            return sums

        plgpu.copy_gmem_to_smem(weight_g, weight_s, of_weight)
        for i in range(plan.stages):
            pl.when(i < count)(functools.partial(fetch, i))
        plgpu.barrier_wait(of_weight)
        zero = () if sums_g is None else (plgpu.layout_cast(jnp.zeros(plan.piece, F32), plan.layout),) * 2
        sums = lax.fori_loop(0, count, step, zero)
        plgpu.wait_smem_to_gmem(0)
        if sums_g is None:
            return
        for half, total in enumerate(sums):
            weight_s.at[half][...] = jnp.sum(jnp.sum(total, axis=1), axis=0) * plan.factor
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(weight_s, sums_g.at[block])
        plgpu.wait_smem_to_gmem(0)

    ring = zip(shapes, (*ins, *turn_g), strict=True)
    pl.run_scoped(
        scoped,
        tuple(plgpu.SMEM((plan.stages, plan.tile, *shape), a.dtype) for shape, a in ring),
        tuple(plgpu.SMEM((2, plan.tile, plan.heads, plan.width), a.dtype) for a in outs),
        plgpu.SMEM((2, plan.pairs), F32),
        plgpu.Barrier(num_arrivals=len(shapes), num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=1),
    )


def call(plan: Plan, name: str, body, results, *arrays):
    """`body(plan, *arrays, *results)` of a kernel of that name, on all thread blocks."""
    kernel = over_blocks(name, functools.partial(body, plan), plan.blocks, results)
    return call_varying(jax.custom_batching.sequential_vmap(kernel), *arrays)


def sums_like(plan: Plan):
    """Sums of the weights' gradients, of each thread block."""
    return jax.ShapeDtypeStruct((plan.blocks, 2, plan.pairs), F32)
