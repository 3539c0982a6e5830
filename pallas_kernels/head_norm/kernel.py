# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernels of the RMS norm of heads with their rotation, and of its gradient.

A thread block is one warpgroup that walks over tokens of its own; they come through a ring in shared memory. Of each
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

from pallas_kernels.mosaic_gpu import F32, LANE_PARAMS, named_body, over_blocks
from pallas_kernels.varying import call_varying, unchecked_varying

STAGES = 3
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


def _walk(plan: Plan, ins, turn_g, weight_g, out_g, of_piece, sums, finish):
    """`of_piece(halves of each array, turn, weights, sums) -> (halves of the result, sums)` of all pieces of the tiles
    of this thread block; then `finish(sums, shared memory for weights)`."""
    block = lax.axis_index("blocks")
    count = (plan.tiles - block + plan.blocks - 1) // plan.blocks
    own = pl.ds(0, plan.heads)
    tile = lambda i: pl.ds((block + i * plan.blocks) * plan.tile, plan.tile)
    shapes = [*[(plan.heads, plan.width)] * len(ins), *(a.shape[1:] for a in turn_g)]

    def scoped(in_s, out_s, weight_s, arrived, of_weight):
        def fetch(i):
            slot = lax.rem(i, STAGES)
            parts = [*(array.at[tile(i), own] for array in ins), *(array.at[tile(i)] for array in turn_g)]
            for part, shared in zip(parts, in_s, strict=True):
                plgpu.copy_gmem_to_smem(part, shared.at[slot], arrived.at[slot])

        def step(i, sums):
            slot, out = lax.rem(i, STAGES), lax.rem(i, 2)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # all threads: nobody writes what is still read
            plgpu.barrier_wait(arrived.at[slot])
            for rows, heads in plan.pieces():
                halves = [plan.halves(shared, slot, rows, heads) for shared in in_s[: len(ins)]]
                turn = plan.turn(in_s[-1].at[slot], rows) if turn_g else None
                made, sums = of_piece(halves, turn, plan.weights(weight_s), sums)
                for half, value in enumerate(made):
                    at = out, rows, heads, pl.ds(half * plan.pairs, plan.pairs)
                    out_s.at[at][...] = value.astype(out_s.dtype)
            plgpu.commit_smem()  # all have read the slot, too
            plgpu.copy_smem_to_gmem(out_s.at[out], out_g.at[tile(i), own])
            pl.when(i + STAGES < count)(lambda: fetch(i + STAGES))
            return sums

        plgpu.copy_gmem_to_smem(weight_g, weight_s, of_weight)
        for i in range(STAGES):
            pl.when(i < count)(functools.partial(fetch, i))
        plgpu.barrier_wait(of_weight)
        total = lax.fori_loop(0, count, step, sums)
        plgpu.wait_smem_to_gmem(0)
        finish(block, total, weight_s)

    pl.run_scoped(
        scoped,
        tuple(
            plgpu.SMEM((STAGES, plan.tile, *shape), a.dtype) for shape, a in zip(shapes, (*ins, *turn_g), strict=True)
        ),
        plgpu.SMEM((2, plan.tile, plan.heads, plan.width), out_g.dtype),
        plgpu.SMEM((2, plan.pairs), F32),
        plgpu.Barrier(num_arrivals=len(shapes), num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=1),
    )


def _forward_body(plan: Plan, x_g, weight_g, *refs):
    *turn_g, y_g = refs

    def of_piece(halves, turn, weights, sums):
        root = plan.root(halves[0])
        first, second = (x * root * weight for x, weight in zip(halves[0], weights, strict=True))
        if turn is not None:
            cos, sin = turn
            first, second = first * cos - second * sin, second * cos + first * sin
        return (first, second), sums

    _walk(plan, (x_g,), turn_g, weight_g, y_g, of_piece, 0, lambda *_: None)


def _backward_body(plan: Plan, x_g, weight_g, *refs):
    dy_g, *turn_g, dx_g, sums_g = refs if plan.apart else (refs[-2], *refs)

    def of_piece(halves, turn, weights, sums):
        x, (first, second) = halves
        root = plan.root(x)
        if turn is not None:
            cos, sin = turn
            first, second = first * cos + second * sin, second * cos - first * sin
        normed = [half * root for half in x]
        grads = [d * weight for d, weight in zip((first, second), weights, strict=True)]
        across = jnp.sum(grads[0] * normed[0] + grads[1] * normed[1], axis=2) * (1.0 / plan.width)
        mean = plan.over(across, 2)
        made = tuple((grad - half * mean) * root for grad, half in zip(grads, normed, strict=True))
        d_weight = (first * normed[0], second * normed[1])
        return made, tuple(total + d for total, d in zip(sums, d_weight, strict=True))

    def finish(block, sums, weight_s):
        for half, total in enumerate(sums):
            weight_s.at[half][...] = jnp.sum(jnp.sum(total, axis=1), axis=0) * plan.factor
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(weight_s, sums_g.at[block])
        plgpu.wait_smem_to_gmem(0)

    zero = plgpu.layout_cast(jnp.zeros(plan.piece, F32), plan.layout)
    _walk(plan, (x_g, dy_g), turn_g, weight_g, dx_g, of_piece, (zero, zero), finish)


def _call(plan: Plan, name: str, body, results, *arrays):
    kernel = over_blocks(name, functools.partial(body, plan), plan.blocks, results)
    return call_varying(jax.custom_batching.sequential_vmap(kernel), *arrays)


def _in_place(plan: Plan, x_RHP, weight, dy_RHP, *turn):
    """(dy with the gradient of x's first heads in the place of theirs, sums): a tile is written where it was read."""
    body = named_body("head_norm_gradients", _backward_body, plan)
    mesh = plgpu.Mesh(grid=(plan.blocks,), grid_names=("blocks",))
    with unchecked_varying():
        dx = jax.new_ref(dy_RHP)
        run = pl.kernel(body, out_type=_sums(plan), mesh=mesh, compiler_params=LANE_PARAMS, name=body.__name__)
        sums = run(x_RHP, weight, *turn, dx)
        return jax.freeze(dx), sums


def _sums(plan: Plan):
    """Of the weights' gradients, of each thread block."""
    return jax.ShapeDtypeStruct((plan.blocks, 2, plan.pairs), F32)


@functools.partial(jax.jit, static_argnums=(0,))
def head_norm(plan: Plan, x_RHP, weight_P, turn_RcC):
    """See `pallas_kernels.head_norm.head_norm`."""
    turn = () if turn_RcC is None else (turn_RcC,)
    like = jax.ShapeDtypeStruct((plan.rows, plan.heads, plan.width), x_RHP.dtype)
    return _call(plan, "head_norm", _forward_body, like, x_RHP, weight_P.reshape(2, plan.pairs), *turn)


@functools.partial(jax.jit, static_argnums=(0,))
def head_norm_gradients(plan: Plan, x_RHP, weight_P, turn_RcC, dy_RHP):
    """See `pallas_kernels.head_norm.head_norm_gradients`."""
    turn = () if turn_RcC is None else (turn_RcC,)
    arrays = x_RHP, weight_P.reshape(2, plan.pairs), dy_RHP, *turn
    if plan.apart:
        results = jax.ShapeDtypeStruct(x_RHP.shape, x_RHP.dtype), _sums(plan)
        dx, sums = _call(plan, "head_norm_gradients", _backward_body, results, *arrays)
    else:
        run = jax.custom_batching.sequential_vmap(functools.partial(_in_place, plan))
        dx, sums = call_varying(run, *arrays)
    return dx, sums.sum(0).reshape(-1)
