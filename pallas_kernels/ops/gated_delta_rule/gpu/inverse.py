# SPDX-License-Identifier: Apache-2.0
"""The inverse of a unit lower triangle of 64 tokens, within a Hopper kernel, in float32 accuracy.

Blocks of 16 on the diagonal by forward substitution, a block a warp, whose threads hand each other rows; from there by
halves, as `pallas_kernels.chunks.unit_inverse`: the inverse of two blocks and what stands below them is that of each,
and one product on either side. No power of the triangle is taken, whose entries may be large where those of the
inverse are not. Products are on the matrix unit, of two bfloat16 terms (16 bits) of each operand.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, vector

from pallas_kernels.mosaic_gpu import F32, TILE, WGMMA, accumulate, sums_of, tile_index

BLOCK = 16  # of the diagonal: the rows of an accumulator that one warp holds
SCRATCH = 5


def unit_inverse(below, target, scratch) -> None:
    """Writes (1 + below)^-1 to `target`, a bfloat16 tile; `below` a strictly lower float32 triangle in registers.

    `scratch` are SCRATCH more such tiles. What is written is to be committed by the caller.

    A product reads the rows of its left operand by the warp that wrote them, and those of its right one by all: so
    between a product and the next write of its right operand stands the commit of another one's operands.
    """
    factor, whole, rest = scratch[:2], scratch[2:4], (target, scratch[4])
    _store(factor, below)
    inverse = invert_blocks(below)
    apart = tile_index(0) ^ tile_index(1)  # its highest bit says at which halving row and column part
    for width in (BLOCK, 2 * BLOCK):
        _store(whole, inverse)
        plgpu.commit_smem()
        product = _product(factor, whole)  # by blocks on the diagonal, so that what is to be kept is masked afterwards
        _store(rest, jnp.where(apart >= width, jnp.where(apart < 2 * width, product, 0.0), 0.0))
        plgpu.commit_smem()
        inverse -= _product(whole, rest)
    plgpu.commit_smem()  # all have read `target`
    target[...] = inverse.astype(jnp.bfloat16)


def _store(tiles, array) -> None:
    """Two bfloat16 terms of an array, of 16 bits in all, to two tiles."""
    high = array.astype(jnp.bfloat16)
    tiles[0][...] = high
    tiles[1][...] = (array - high.astype(F32)).astype(jnp.bfloat16)


def _product(left, right):
    """left @ right of such pairs of tiles."""

    def work(acc):
        plgpu.wgmma(acc, left[1], right[0])
        plgpu.wgmma(acc, left[0], right[1])
        plgpu.wgmma(acc, left[0], right[0])
        return sums_of(acc)

    return accumulate(work, TILE)


@plgpu.inline_mgpu(
    arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct((TILE, TILE), jnp.float32, layout=WGMMA)
)
def invert_blocks(_, below):
    """The inverses of the blocks of 16 on the diagonal of 1 + below, zeros elsewhere.

    Of an accumulator, thread 4 r + c of warp w holds rows 16 w + r and 16 w + r + 8, columns 8 n + 2 c and the next.
    Row i of the inverse is final once the rows before it have been taken off: it then is taken off those behind it,
    ``below[r, i]`` times, to which thread 4 (i % 8) + c hands the row, and the thread that holds it, the factor.
    """
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()

    def constant(value):
        return mgpu.c(value, i32)

    thread = mgpu.thread_idx()
    warp = arith.remui(arith.divui(thread, constant(32)), constant(4))
    lane = arith.remui(thread, constant(32))
    own_row, own_col = arith.divui(lane, constant(4)), arith.remui(lane, constant(4))
    held = below.registers.reshape(8, 2)
    is_warp = [arith.cmpi(arith.CmpIPredicate.eq, warp, constant(w)) for w in range(4)]

    def element(register, k):
        return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([k]))

    def of_block(n, half):
        register = held[n, half]
        for w in range(1, 4):
            register = arith.select(is_warp[w], held[2 * w + n, half], register)
        return [element(register, k) for k in range(2)]

    def shuffle(value, source):
        mask, clamp = mgpu.c(0xFFFFFFFF, i32), constant(31)
        moved = nvvm.shfl_sync(mask, arith.bitcast(i32, value), source, clamp, nvvm.ShflKind.idx)
        return arith.bitcast(f32, moved)

    factor = {(n, half): of_block(n, half) for n, half in np.ndindex(2, 2)}
    zero, one = mgpu.c(0.0, f32), mgpu.c(1.0, f32)
    inverse = {}
    for n, half, k in np.ndindex(2, 2, 2):
        col = arith.addi(arith.muli(own_col, constant(2)), constant(8 * n + k))
        on = arith.cmpi(arith.CmpIPredicate.eq, arith.addi(own_row, constant(8 * half)), col)
        inverse[n, half, k] = arith.select(on, one, zero)
    four = arith.muli(own_row, constant(4))
    for i in range(BLOCK - 1):
        columns = [(n, k) for n, k in np.ndindex(2, 2) if n <= i // 8]  # the row is zero behind its diagonal
        source = arith.addi(own_col, constant(4 * (i % 8)))
        taken = {(n, k): shuffle(inverse[n, i // 8, k], source) for n, k in columns}
        for half in range((i + 1) // 8, 2):  # rows behind i
            holder = arith.addi(four, constant(i % 8 // 2))
            times = shuffle(factor[i // 8, half][i % 2], holder)
            for n, k in columns:
                inverse[n, half, k] = arith.subf(inverse[n, half, k], arith.mulf(times, taken[n, k]))

    pair = ir.VectorType.get((2,), f32)
    registers = np.empty_like(held)
    for n, half in np.ndindex(8, 2):
        values = vector.from_elements(pair, [inverse[n % 2, half, k] for k in range(2)])
        registers[n, half] = arith.select(is_warp[n // 2], values, vector.broadcast(pair, zero))
    registers = registers.reshape(below.registers.shape)
    return mgpu.FragmentedArray(_registers=registers, _layout=below.layout, _is_signed=None)
