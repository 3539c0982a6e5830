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


def _place(hidden: bool = False):
    """(warp of the warpgroup, r, c) of the thread; hidden: as `hidden_zero`, so that all that is told from them."""
    thread = mgpu.thread_idx()
    if hidden:
        thread = llvm.inline_asm(thread.type, [thread], "mov.u32 $0, $1;", "=r,r", has_side_effects=True)
    lane = arith.remui(thread, _i32(32))
    return (
        arith.remui(arith.divui(thread, _i32(32)), _i32(4)),
        arith.divui(lane, _i32(4)),
        arith.remui(lane, _i32(4)),
    )


def _element(pair, k: int):
    return vector.extract(pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([k]))


def _shuffle(value, lane):
    """A float32 of another thread of the warp."""
    i32 = ir.IntegerType.get_signless(32)
    mask = mgpu.c(0xFFFFFFFF, i32)
    moved = nvvm.shfl_sync(mask, arith.bitcast(i32, value), lane, _i32(31), nvvm.ShflKind.idx)
    return arith.bitcast(ir.F32Type.get(), moved)


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
    f32 = ir.F32Type.get()
    warp, r, c = _place()
    held = below.registers.reshape(8, 2)
    is_warp = [arith.cmpi(arith.CmpIPredicate.eq, warp, _i32(w)) for w in range(4)]

    def of_block(n, half):
        register = held[n, half]
        for w in range(1, 4):
            register = arith.select(is_warp[w], held[2 * w + n, half], register)
        return [_element(register, k) for k in range(2)]

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
        taken = {(n, k): _shuffle(inverse[n, i // 8, k], source) for n, k in columns}
        for half in range((i + 1) // 8, 2):  # rows behind i
            times = _shuffle(factor[i // 8, half][i % 2], arith.addi(four, _i32(i % 8 // 2)))
            for n, k in columns:
                inverse[n, half, k] = arith.subf(inverse[n, half, k], arith.mulf(times, taken[n, k]))

    pair = ir.VectorType.get((2,), f32)
    registers = np.empty_like(held)
    for n, half in np.ndindex(8, 2):
        values = vector.from_elements(pair, [inverse[n % 2, half, k] for k in range(2)])
        registers[n, half] = arith.select(is_warp[n // 2], values, vector.broadcast(pair, zero))
    return _like(below, registers)


# Sums along tokens of a [64, 64] tile, of 64 channels: within the blocks of 16 of a warp by handing numbers on, between
# warps by their totals, [4, 64] of shared memory.


def _pairwise(combine, *pairs):
    """A pair of numbers, each of those of `pairs`."""
    values = [combine(*(_element(pair, k) for pair in pairs)) for k in range(2)]
    return vector.from_elements(pairs[0].type, values)


def _scan(reverse: bool, _, tile):
    """Sums of each row and those before it in its block of 16; reverse: and those behind it."""
    _, r, c = _place(hidden=True)
    zero, held = mgpu.c(0.0, ir.F32Type.get()), tile.registers.reshape(8, 2)
    lane = arith.addi(arith.muli(r, _i32(4)), c)
    shift, end = (1, c) if reverse else (-1, arith.addi(_i32(28), c))  # the row that has all eight
    reach = {}
    for step in (1, 2, 4):
        source = arith.andi(arith.addi(lane, _i32(4 * step * shift)), _i32(31))
        inside = arith.cmpi(
            arith.CmpIPredicate.slt if reverse else arith.CmpIPredicate.sge, r, _i32(8 - step if reverse else step)
        )
        reach[step] = source, inside
    first, second = (1, 0) if reverse else (0, 1)
    registers = np.empty_like(held)
    for n in range(8):
        done: dict[int, list] = {}
        for half in (first, second):
            values = [_element(held[n, half], k) for k in range(2)]
            for source, inside in reach.values():
                values = [arith.addf(v, arith.select(inside, _shuffle(v, source), zero)) for v in values]
            if half == second:
                values = [arith.addf(v, _shuffle(w, end)) for v, w in zip(values, done[first], strict=True)]
            done[half] = values
            registers[n, half] = vector.from_elements(held[n, half].type, values)
    return _like(tile, registers)


sums_upto = _one_tile(functools.partial(_scan, False))
sums_from = _one_tile(functools.partial(_scan, True))


def _store_totals(row: int, ctx, target, sums):
    del ctx
    warp, r, c = _place(hidden=True)
    held = sums.registers.reshape(8, 2)
    with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, r, _i32(row % 8))):
        for n in range(8):
            vector.store(held[n, row // 8], target, [_index(warp), _index(_column(n, c))])


def _index(value):
    return arith.index_cast(ir.IndexType.get(), value)


def _column(n: int, c):
    return arith.addi(arith.muli(c, _i32(2)), _i32(8 * n))


_totals = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA))
store_totals_upto = _totals(functools.partial(_store_totals, BLOCK - 1))  # of `sums_upto`
store_totals_from = _totals(functools.partial(_store_totals, 0))  # of `sums_from`


def _others(kind: str, _, totals):
    """Of each channel the sum of the totals of other blocks: "before" that of the row, "behind" it, or of "all"."""
    warp, _, c = _place(hidden=True)
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    zeros = vector.broadcast(pair, mgpu.c(0.0, ir.F32Type.get()))
    predicate = {"before": arith.CmpIPredicate.sgt, "behind": arith.CmpIPredicate.slt}.get(kind)
    registers = np.empty((8, 2), dtype=object)
    for n in range(8):
        total = zeros
        for w in {"before": (0, 1, 2), "behind": (1, 2, 3), "all": (0, 1, 2, 3)}[kind]:
            own = vector.load(pair, totals, [_index(_i32(w)), _index(_column(n, c))])
            if predicate is not None:
                own = arith.select(arith.cmpi(predicate, warp, _i32(w)), own, zeros)
            total = arith.addf(total, own)
        registers[n, :] = total
    return _fresh(registers)


def _fresh(registers):
    layout = WGMMA.to_mgpu()
    shape = layout.registers_shape((TILE, TILE))
    return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)


others = {
    kind: plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_TILE_F32)(functools.partial(_others, kind))
    for kind in ("before", "behind", "all")
}


def _store_padded(_, target, sums):
    warp, r, c = _place(hidden=True)
    held = sums.registers.reshape(8, 2)
    for n, half in np.ndindex(8, 2):
        row = arith.addi(arith.muli(warp, _i32(BLOCK)), arith.addi(r, _i32(8 * half)))
        vector.store(held[n, half], target, [_index(row), _index(_column(n, c))])


PADDED = TILE + 8  # columns of a tile in shared memory of which a warp reads 8 rows at once, four threads each
store_padded = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA))(_store_padded)


def _distance(_, sums, bits):
    """Decay between a row and the middle of its block of ``2 << bits`` rows, by the chunk's sums up to each row.

    Behind the middle it is the sum of the rows since then, the own included; before it, that of the rows up to it, the
    own excluded. With log decays it is at most 0, and of two rows on either side it is that between them in all. The
    level is known at run time only: six times as much code would not stay in the instruction cache.
    """
    warp, r, c = _place(hidden=True)
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    width = arith.shli(_i32(1), bits.registers.item())
    block = arith.subi(arith.addi(width, width), _i32(1))
    registers = np.empty((8, 2), dtype=object)
    for half in range(2):
        row = arith.addi(arith.muli(warp, _i32(BLOCK)), arith.addi(r, _i32(8 * half)))
        right = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(row, width), _i32(0))
        middle = arith.subi(arith.ori(row, block), width)
        for n in range(8):
            own, mid = (vector.load(pair, sums, [_index(at), _index(_column(n, c))]) for at in (row, middle))
            moved = arith.subf(own, mid)
            registers[n, half] = arith.select(right, moved, arith.negf(moved))
    return _fresh(registers)


_SCALAR = plgpu.Layout.WG_SPLAT(())
distance = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR), return_type=_TILE_F32)(_distance)


LEVELS = 6  # blocks of 2, 4, ... 64 tokens


def _keep_level(transposed: bool, _, tile, bits):
    """Pairs (row, column) behind and before the middle of a block of ``2 << bits``; transposed: (column, row)."""
    warp, r, c = _place(hidden=True)
    held = tile.registers.reshape(8, 2)
    zero = mgpu.c(0.0, ir.VectorType(held[0, 0].type).element_type)
    shifted = lambda index: arith.shrui(index, bits.registers.item())
    columns = {(n, k): shifted(arith.addi(_column(n, c), _i32(k))) for n, k in np.ndindex(8, 2)}
    registers = np.empty_like(held)
    for half in range(2):
        row = shifted(arith.addi(arith.muli(warp, _i32(BLOCK)), arith.addi(r, _i32(8 * half))))
        ahead = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(row, _i32(1)), _i32(0 if transposed else 1))
        mate = arith.select(ahead, arith.xori(row, _i32(1)), _i32(-1))
        for n in range(8):
            keep = [arith.cmpi(arith.CmpIPredicate.eq, mate, columns[n, k]) for k in range(2)]
            values = [arith.select(keep[k], _element(held[n, half], k), zero) for k in range(2)]
            registers[n, half] = vector.from_elements(held[n, half].type, values)
    return _like(tile, registers)


_KEEP_LEVEL = {
    (transposed, jnp.dtype(tile.dtype)): plgpu.inline_mgpu(arg_types=(WGMMA, _SCALAR), return_type=tile)(
        functools.partial(_keep_level, transposed)
    )
    for transposed in (False, True)
    for tile in (_TILE_F32, _TILE_BF16)
}


def keep_level(tile, bits, transposed: bool = False):
    """What of a tile is of a level's pairs, see `_keep_level`; else 0."""
    return _KEEP_LEVEL[transposed, tile.dtype](tile, bits)
