# SPDX-License-Identifier: Apache-2.0
"""Which thread of a Hopper warpgroup holds what of a selective scan, and the sums over threads, in Mosaic's own words.

A thread holds ``width`` neighbouring channels, of each a quarter of the 16 states: thread 4 c + s of warp w has the
channels from (8 w + c) width on, of each states 4 s to 4 s + 3. Four threads that share channels are a quad. Sums over
states are taken four tokens at a time, so that each thread of the quad ends with the sums of one token, and sums over
channels so that each thread of the warp ends with that of one state: fewest shuffles, no thread repeats another's work.

Tests replace these functions by plain ones (tests/ops/interpreter.py).
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

STATES = 16  # of a channel
QUAD = 4  # threads that share channels, and tokens whose sums over states are taken together
HELD = STATES // QUAD  # states of a channel that a thread holds
WARPS, LANES = 4, 32  # of a warpgroup, of a warp
GROUPS = LANES // QUAD  # quads of a warp
F32 = jnp.float32


def make_layout(tiles, warp_dims, lane_dims, vector_dim):
    tiling = fragmented_array.Tiling(tiles)
    layout = mgpu.TiledLayout(tiling, warp_dims, lane_dims, vector_dim, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def replicated(times: int):
    """In place of a dimension: so many warps or threads that hold the same."""
    return fragmented_array.Replicated(times)


@dataclasses.dataclass(frozen=True)
class Threads:
    """Layouts of arrays over a warpgroup whose threads hold `width` channels each, and what the threads do."""

    width: int

    @property
    def channels(self) -> int:
        return WARPS * GROUPS * self.width

    @functools.cached_property
    def both(self):
        """Of ``[channels, 16]``."""
        warp, channels = GROUPS * self.width, self.channels
        return make_layout(((channels, STATES), (warp, STATES), (self.width, HELD)), (-6,), (-4, -3), -1)

    @functools.cached_property
    def row(self):
        """Of ``[channels]``, the same in the threads of a quad."""
        warp = GROUPS * self.width
        return make_layout(((self.channels,), (warp,), (self.width,)), (-3,), (-2, replicated(QUAD)), -1)

    @functools.cached_property
    def column(self):
        """Of ``[16]``, the same in all threads that hold the same states."""
        return self.both.reduce(0)

    @functools.cached_property
    def shares(self):
        """Of ``[channels, 4]``, a number a thread of the quad."""
        warp, channels = GROUPS * self.width, self.channels
        return make_layout(((channels, QUAD), (warp, QUAD), (self.width, 1)), (-6,), (-4, -3), -2)

    @functools.cached_property
    def tokens(self):
        """Of ``[4, channels]``, a token a thread of the quad."""
        warp = GROUPS * self.width
        return make_layout(((QUAD, self.channels), (1, warp), (1, self.width)), (-5,), (-3, -6), -1)

    @functools.cached_property
    def line(self):
        """Of ``[4, 32]``, warps and their threads."""
        return plgpu.Layout.WG_STRIDED((WARPS, LANES), vec_size=1)

    def widen(self, array, layout):
        """The array of a layout as float32: two bfloat16 by two instructions, where the compiler takes three."""
        if array.dtype != jnp.bfloat16 or self.width != 2:
            return array.astype(F32)

        @plgpu.inline_mgpu(arg_types=(layout,), return_type=self._of(array.shape, layout))
        def widen(_, array):
            registers = []
            for register in array.registers.flat:
                word = vector.bitcast(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), register)
                halves = arith.shli(element(word, 0), i32(16)), arith.andi(element(word, 0), i32(0xFFFF0000))
                registers.append(_pack([arith.bitcast(ir.F32Type.get(), half) for half in halves]))
            return fragments(registers, layout, array.shape)

        return widen(array)

    @functools.cached_property
    def spread(self):
        """``[channels]`` -> ``[channels, 16]``."""

        @plgpu.inline_mgpu(arg_types=(self.row,), return_type=self._of((self.channels, STATES), self.both))
        def spread(_, row):
            pair = row.registers.flat[0]
            held = ir.VectorType.get((HELD,), ir.F32Type.get())
            registers = [vector.broadcast(held, element(pair, v)) for v in range(self.width)]
            return fragments(registers, self.both, (self.channels, STATES))

        return spread

    @functools.cached_property
    def sum_own(self):
        """``[channels, 16]`` -> ``[channels, 4]``, sums over the states that a thread holds."""

        @plgpu.inline_mgpu(arg_types=(self.both,), return_type=self._of((self.channels, QUAD), self.shares))
        def sum_own(_, array):
            sums = [sum_held(register) for register in array.registers.flat]
            return fragments([_pack(sums)], self.shares, (self.channels, QUAD))

        return sum_own

    @functools.cached_property
    def sum_states(self):
        """Four ``[channels, 4]``, one a token -> ``[4, channels]``."""

        @plgpu.inline_mgpu(arg_types=(self.shares,) * QUAD, return_type=self._of((QUAD, self.channels), self.tokens))
        def sum_states(_, *tokens):
            shares = [[element(token.registers.flat[0], v) for v in range(self.width)] for token in tokens]
            (mine,) = _scatter(shares, (2, 1))
            return fragments([_pack(mine)], self.tokens, (QUAD, self.channels))

        return sum_states

    @functools.cached_property
    def sum_channels(self):
        """Two ``[channels, 16]`` -> sums over each warp's channels, ``[4, 32]``, where `places` says."""

        @plgpu.inline_mgpu(arg_types=(self.both,) * 2, return_type=self._of((WARPS, LANES), self.line))
        def sum_channels(_, *arrays):
            sums = []
            for array in arrays:
                total = functools.reduce(add, array.registers.flat)
                sums += [[element(total, k)] for k in range(HELD)]
            ((mine,),) = _scatter(sums, (4, 8, 16))
            return fragments([_pack([mine])], self.line, (WARPS, LANES))

        return sum_channels

    @functools.cached_property
    def store(self):
        """Writes ``[4, channels]`` to rows of global memory, as which the compiler knows it: loads of shared memory
        pass it."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.tokens))
        def store(_, target, array):
            (row, _), _ = ir.MemRefType(target.type).get_strides_and_offset()
            where = llvm.addrspacecast(ir.Type.parse("!llvm.ptr<1>"), mgpu.utils.memref_ptr(target))
            thread = arith.remui(mgpu.thread_idx(), i32(WARPS * LANES))  # of the warpgroup: a block has several
            token = arith.muli(arith.remui(thread, i32(QUAD)), i32(row))
            channel = arith.muli(arith.divui(thread, i32(QUAD)), i32(self.width))
            (held,) = array.registers.flat
            llvm.store(held, _at(where, ir.VectorType(held.type).element_type, arith.addi(token, channel)))

        return store

    def _of(self, shape, layout):
        return plgpu.ShapeDtypeStruct(shape, F32, layout=layout)


def fragments(registers: list, layout, shape):
    """The array of a layout and shape that threads hold in these registers."""
    layout, held = layout.to_mgpu(), np.empty(len(registers), dtype=object)
    held[:] = registers
    return mgpu.FragmentedArray(_registers=held.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None)


def _at(pointer, kind, place):
    return llvm.getelementptr(pointer.type, pointer, [place], [-(2**31)], kind, 0)


def places() -> np.ndarray:
    """Of `sum_channels`: int ``[2, 16]``, where in a warp's 32 numbers the sum of each of two arrays' states stands."""
    found = np.empty((2, STATES), np.int32)
    for which, state in np.ndindex(2, STATES):
        value, place = which * HELD + state % HELD, 0  # of the 8 values of a thread, halved thrice
        for step, half in ((4, 4), (8, 2), (16, 1)):
            place += step * (value // half % 2)
        found[which, state] = place + state // HELD
    return found


def _pack(values: list):
    """A register of them."""
    return vector.from_elements(ir.VectorType.get((len(values),), ir.F32Type.get()), values)


def i32(value: int):
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def element(register, k: int):
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([k]))


def add(a, b):
    """a + b, one instruction with a product that is added."""
    return arith.addf(a, b, fastmath=arith.FastMathFlags.contract)


def sum_held(register):
    """Of the states that a thread holds of a channel."""
    return functools.reduce(add, [element(register, k) for k in range(HELD)])


def _shuffle(value, distance: int):
    """The value of the thread whose lane differs in the bit `distance`."""
    word = ir.IntegerType.get_signless(32)
    mask = mgpu.c(0xFFFFFFFF, word)
    moved = nvvm.shfl_sync(mask, arith.bitcast(word, value), i32(distance), i32(31), nvvm.ShflKind.bfly)
    return arith.bitcast(ir.F32Type.get(), moved)


def _scatter(values: list[list], distances: tuple[int, ...]) -> list[list]:
    """Sums over the lanes at `distances`, each half of the list given to the lanes without and with the bit."""
    lane = arith.remui(mgpu.thread_idx(), i32(LANES))
    for distance in distances:
        upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, i32(distance)), i32(0))
        half = len(values) // 2
        summed = []
        for low, high in zip(values[:half], values[half:], strict=True):
            kept = []
            for a, b in zip(low, high, strict=True):
                sent = arith.select(upper, a, b)
                kept.append(add(arith.select(upper, b, a), _shuffle(sent, distance)))
            summed.append(kept)
        values = summed
    return values
