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


def named_body(name: str, body, *args):
    """A kernel's body with its first arguments, under the name that profiles show."""
    body = functools.partial(body, *args)
    body.__name__ = name
    return body
