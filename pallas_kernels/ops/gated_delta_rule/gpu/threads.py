# SPDX-License-Identifier: Apache-2.0
"""What the threads of a Hopper warpgroup do with a [64, 64] accumulator among each other, in Mosaic's own words.

Thread 4 r + c of warp w holds rows 16 w + r and 16 w + r + 8, of each the columns 8 n + 2 c and the next: registers
(n, half) of two numbers. Which of them to keep is told from one number a thread, against constants. Written as arrays
of indices, the same would hold dozens of registers throughout a kernel's loop.

Tests replace these functions by plain ones (tests/ops/interpreter.py).
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from pallas_kernels.mosaic_gpu import TILE, WGMMA

BLOCK = 16  # rows of one warp
_TILE_F32 = plgpu.ShapeDtypeStruct((TILE, TILE), jnp.float32, layout=WGMMA)
_TILE_BF16 = plgpu.ShapeDtypeStruct((TILE, TILE), jnp.bfloat16, layout=WGMMA)


@plgpu.inline_mgpu(
    return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
)
def hidden_zero(_):
    """0, which the compiler does not know: what is computed of it in a loop is not moved out of it.

    A tile of shared memory at a fixed place has up to 8 descriptors for the matrix unit and 4 addresses a thread. Moved
    out of a kernel's loop, those of a few tiles take all of the registers that the loop needs.
    """
    i32 = ir.IntegerType.get_signless(32)
    zero = llvm.inline_asm(i32, [], "mov.u32 $0, 0;", "=r", has_side_effects=True)
    return mgpu.FragmentedArray.splat(zero, (), mgpu.WGSplatFragLayout(()), is_signed=True)


def _i32(value: int):
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _place():
    """(warp of the warpgroup, r, c) of the thread."""
    thread = mgpu.thread_idx()
    lane = arith.remui(thread, _i32(32))
    return (
        arith.remui(arith.divui(thread, _i32(32)), _i32(4)),
        arith.divui(lane, _i32(4)),
        arith.remui(lane, _i32(4)),
    )


def _element(pair, k: int):
    return vector.extract(pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([k]))


def _like(array, registers):
    return mgpu.FragmentedArray(
        _registers=registers.reshape(array.registers.shape), _layout=array.layout, _is_signed=None
    )


def _keep(name: str, _, tile):
    predicate = {"lower": "sge", "strictly_lower": "sgt", "upper": "sle", "diagonal": "eq"}[name]
    predicate = getattr(arith.CmpIPredicate, predicate)
    warp, r, c = _place()
    ahead = arith.subi(arith.addi(arith.muli(warp, _i32(BLOCK)), r), arith.muli(c, _i32(2)))  # row - column at (0, 0)
    zero, held = mgpu.c(0.0, ir.F32Type.get()), tile.registers.reshape(8, 2)
    registers = np.empty_like(held)
    for n, half in np.ndindex(8, 2):
        values = []
        for k in range(2):
            keep = arith.cmpi(predicate, ahead, _i32(8 * n + k - 8 * half))
            values.append(arith.select(keep, _element(held[n, half], k), zero))
        registers[n, half] = vector.from_elements(held[n, half].type, values)
    return _like(tile, registers)


_one_tile = plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=_TILE_F32)
keep_lower = _one_tile(functools.partial(_keep, "lower"))
keep_strictly_lower = _one_tile(functools.partial(_keep, "strictly_lower"))
keep_upper = _one_tile(functools.partial(_keep, "upper"))
keep_diagonal = _one_tile(functools.partial(_keep, "diagonal"))


def _keep_between(width: int, _, tile):
    """What stands below the diagonal between two neighbouring blocks of `width`, of a warp's rows or two; else 0."""
    warp, _, _ = _place()
    held = tile.registers.reshape(8, 2)
    zeros = vector.broadcast(held[0, 0].type, mgpu.c(0.0, ir.F32Type.get()))
    registers = np.empty_like(held)
    for n, half in np.ndindex(8, 2):
        keep = None
        if width == BLOCK and n // 2 % 2 == 0:
            keep = arith.cmpi(arith.CmpIPredicate.eq, warp, _i32(n // 2 + 1))
        elif width == 2 * BLOCK and n < 4:
            keep = arith.cmpi(arith.CmpIPredicate.uge, warp, _i32(2))
        registers[n, half] = zeros if keep is None else arith.select(keep, held[n, half], zeros)
    return _like(tile, registers)


keep_between = {width: _one_tile(functools.partial(_keep_between, width)) for width in (BLOCK, 2 * BLOCK)}


@plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=(_TILE_BF16, _TILE_BF16))
def two_terms(_, tile):
    """Two bfloat16 terms of an array, of 16 bits in all."""
    i32 = ir.IntegerType.get_signless(32)
    held = tile.registers.reshape(8, 2)
    short, word = ir.VectorType.get((2,), ir.BF16Type.get()), ir.VectorType.get((1,), i32)
    high, low = np.empty_like(held), np.empty_like(held)
    for at in np.ndindex(8, 2):
        high[at] = arith.truncf(short, held[at])
        bits = _element(vector.bitcast(word, high[at]), 0)
        widened = (arith.shli(bits, _i32(16)), arith.andi(bits, mgpu.c(-65536, i32)))  # bfloat16 is half a float32
        rest = [arith.subf(_element(held[at], k), arith.bitcast(ir.F32Type.get(), widened[k])) for k in range(2)]
        low[at] = arith.truncf(short, vector.from_elements(held[at].type, rest))
    return _like(tile, high), _like(tile, low)


@_one_tile
def invert_blocks(_, below):
    """The inverses of the blocks of 16 on the diagonal of 1 + below, zeros elsewhere; a block a warp.

    Row i of an inverse is final once the rows before it have been taken off: it then is taken off those behind it,
    ``below[r, i]`` times, to which thread 4 (i % 8) + c hands the row, and the thread that holds it, the factor.
    """
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    warp, r, c = _place()
    held = below.registers.reshape(8, 2)
    is_warp = [arith.cmpi(arith.CmpIPredicate.eq, warp, _i32(w)) for w in range(4)]

    def of_block(n, half):
        register = held[n, half]
        for w in range(1, 4):
            register = arith.select(is_warp[w], held[2 * w + n, half], register)
        return [_element(register, k) for k in range(2)]

    def shuffle(value, source):
        mask = mgpu.c(0xFFFFFFFF, i32)
        moved = nvvm.shfl_sync(mask, arith.bitcast(i32, value), source, _i32(31), nvvm.ShflKind.idx)
        return arith.bitcast(f32, moved)

    factor = {(n, half): of_block(n, half) for n, half in np.ndindex(2, 2)}
    zero, one = mgpu.c(0.0, f32), mgpu.c(1.0, f32)
    inverse = {}
    for n, half, k in np.ndindex(2, 2, 2):
        col = arith.addi(arith.muli(c, _i32(2)), _i32(8 * n + k))
        on = arith.cmpi(arith.CmpIPredicate.eq, arith.addi(r, _i32(8 * half)), col)
        inverse[n, half, k] = arith.select(on, one, zero)
    four = arith.muli(r, _i32(4))
    for i in range(BLOCK - 1):
        columns = [(n, k) for n, k in np.ndindex(2, 2) if n <= i // 8]  # the row is zero behind its diagonal
        source = arith.addi(c, _i32(4 * (i % 8)))
        taken = {(n, k): shuffle(inverse[n, i // 8, k], source) for n, k in columns}
        for half in range((i + 1) // 8, 2):  # rows behind i
            times = shuffle(factor[i // 8, half][i % 2], arith.addi(four, _i32(i % 8 // 2)))
            for n, k in columns:
                inverse[n, half, k] = arith.subf(inverse[n, half, k], arith.mulf(times, taken[n, k]))

    pair = ir.VectorType.get((2,), f32)
    registers = np.empty_like(held)
    for n, half in np.ndindex(8, 2):
        values = vector.from_elements(pair, [inverse[n % 2, half, k] for k in range(2)])
        registers[n, half] = arith.select(is_warp[n // 2], values, vector.broadcast(pair, zero))
    return _like(below, registers)
