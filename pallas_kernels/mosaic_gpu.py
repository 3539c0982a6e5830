# SPDX-License-Identifier: Apache-2.0
"""Words that the Hopper kernels (Pallas Mosaic GPU) share: tiles, layouts, vectors beside them, products, barriers.

A compute warpgroup multiplies on the matrix unit: 64 rows of a left operand, from registers or shared memory, with a
right operand in shared memory, summed in float32 in registers. Operands in shared memory are tiled and swizzled.

No barrier is inserted automatically (`PARAMS`): each kernel says why those of its commits and waits are enough. Tests
run the kernels in Mosaic's interpreter, which lacks some of these words: tests/ops/interpreter.py replaces them.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import ask_ptxas_once

ask_ptxas_once()

F32 = jnp.float32
LOG2E = math.log2(math.e)  # exponentials are those of base 2, single instructions
TILE = 64  # rows of a warpgroup's product

WGMMA = plgpu.Layout.WGMMA  # of accumulators, and of left operands in registers
ROW = WGMMA.reduce(1)  # of a vector with a value a row of them
COL = WGMMA.reduce(0)  # of a vector with a value a column

# Rows of 128 bytes in tiles of 8 rows.
BF16_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
F32_TRANSFORMS = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))

PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)
# Of kernels whose arrays say their layouts: where Mosaic is to find them, lowering takes twice as long and more.
LANE_PARAMS = dataclasses.replace(PARAMS, lowering_semantics=plgpu.LoweringSemantics.Lane)


def rows_of(vector, n: int = TILE):
    """[m] -> [m, n], one value a row."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], n), (0,))


def cols_of(vector, m: int = TILE):
    """[n] -> [m, n], one value a column."""
    return lax.broadcast_in_dim(vector, (m, vector.shape[0]), (1,))


def tile_index(axis: int, shape: tuple[int, int] = (TILE, TILE)):
    """int32 index along an axis of an accumulator."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA)


def keep_upper(tile, alone: int = 0):
    """A square tile [row, column], zero where the row lies behind the column: pairs [j, i] of tokens with j <= i.

    With `alone`, a power of 2, also where both lie in the same so many tokens.
    """
    row, column = tile_index(0), tile_index(1)
    return jnp.where(row < (column & -alone) if alone else row <= column, tile, 0.0)


def zeros(n: int):
    """A [64, n] accumulator's value."""
    return plgpu.layout_cast(jnp.zeros((TILE, n), F32), WGMMA)


def load_tile(ref):
    """A tile of shared memory as float32 in registers."""
    return plgpu.load(ref, layout=WGMMA).astype(F32)


def clear_rows(tile, real, dtype):
    """Zeros in the rows of a tile ``[64, n]`` of shared memory where ``real [64, 64]`` does not hold."""
    for n in range(0, tile.shape[-1], TILE):
        part = tile.at[:, pl.ds(n, TILE)]
        part[...] = jnp.where(real, load_tile(part), 0.0).astype(dtype)


def accumulate(work, *widths: int):
    """`work` of as many accumulators [64, width], which hold zeros."""
    return pl.run_scoped(work, *(plgpu.ACC((TILE, n), F32) for n in widths))


def matmul(a, b, onto=None):
    """a @ b, [64, 64] float32, or `onto + a @ b` of any width; `a` an array or a shared-memory ref, `b` a ref."""

    def product(acc):
        plgpu.wgmma(acc, a, b)

    def fresh(acc):
        product(acc)
        return acc[...]

    return accumulate(fresh, TILE) if onto is None else pl.run_state(product)(plgpu.ACC.init(onto))


def sums_of(accumulator, in_flight: int = 0):
    """An accumulator's value, once at most `in_flight` later products are unfinished."""
    return plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight)


def loop_with(accumulator, count: int, step) -> None:
    """`step(i, accumulator)` for every i below `count`; the sums stay in their registers."""
    lax.fori_loop(0, count, lambda i, _: step(i, accumulator), None)


def ring_sums(multiply, first, steps: int, stages: int, barriers, width: int, at_step=None):
    """A warpgroup's products [64, width], of `steps` slots of a ring of `stages`, from its `first` on.

    multiply(accumulator, slot): of what lies in a slot. barriers: (full, empty), of each slot. at_step: called behind
    each step with its number in the ring.
    """
    full, empty = barriers

    def step(k, acc):
        at = first + k
        slot = lax.rem(at, stages)
        plgpu.barrier_wait(full.at[slot])
        multiply(acc, slot)
        plgpu.wgmma_wait(1)
        pl.when(k > 0)(lambda: plgpu.barrier_arrive(empty.at[lax.rem(at - 1, stages)]))
        if at_step is not None:
            at_step(at)

    def sums(acc):
        loop_with(acc, steps, step)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(empty.at[lax.rem(first + steps - 1, stages)])
        return acc[...]

    return accumulate(sums, width)


def stream(rows_g, row, rows_s, fetch_columns, first, steps: int, barriers) -> None:
    """A producer's part of `ring_sums` of two warpgroups: 128 rows from `row` on and, by `fetch_columns(slot, part)`,
    columns, TILE of the summed axis at a time. rows_s: the ring's [stages, 2, TILE, TILE]."""
    (full, empty), stages = barriers, rows_s.shape[0]

    def step(k, _):
        at = first + k
        slot, inner = lax.rem(at, stages), pl.ds(k * TILE, TILE)
        pl.when(at >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
        for half in range(2):
            rows = pl.ds(row + half * TILE, TILE)
            plgpu.copy_gmem_to_smem(rows_g.at[rows, inner], rows_s.at[slot, half], full.at[slot])
        fetch_columns(slot, inner)

    lax.fori_loop(0, steps, step, None)


def drain(steps, stages: int, barriers) -> None:
    """A producer's last waits, so that every arrival of `steps` at barriers of `stages` slots is observed."""

    def wait(step):
        @pl.when(step >= 0)
        def _():
            for barrier in barriers:
                plgpu.barrier_wait(barrier.at[lax.rem(step, stages)])

    for i in range(stages):
        wait(steps - stages + i)


def in_one_warp(work) -> None:
    """Runs `work` in the first warp of the warpgroup alone."""
    plgpu.warp_map(lambda warp: pl.when(warp == 0)(work))


def over_blocks(name: str, body, blocks: int, out_type):
    """A kernel of so many thread blocks, each one warpgroup that finds its own part by the axis `blocks`."""
    return plgpu.kernel(
        named_body(name, body),
        out_type=out_type,
        grid=(blocks,),
        grid_names=("blocks",),
        compiler_params=LANE_PARAMS,
    )


def named_body(name: str, body, *args):
    """A kernel's body with its first arguments, under the name that profiles show."""
    body = functools.partial(body, *args)
    body.__name__ = name
    return body
