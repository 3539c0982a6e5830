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
from jaxlib.mlir.dialects import arith, nvvm, vector

STATES = 16  # of a channel
QUAD = 4  # threads that share channels, and tokens whose sums over states are taken together
HELD = STATES // QUAD  # states of a channel that a thread holds
WARPS, LANES = 4, 32  # of a warpgroup, of a warp
GROUPS = LANES // QUAD  # quads of a warp
F32 = jnp.float32


def _layout(tiles, warp_dims, lane_dims, vector_dim):
    tiling = fragmented_array.Tiling(tiles)
    layout = mgpu.TiledLayout(tiling, warp_dims, lane_dims, vector_dim, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


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
        return _layout(((channels, STATES), (warp, STATES), (self.width, HELD)), (-6,), (-4, -3), -1)

    @functools.cached_property
    def row(self):
        """Of ``[channels]``, the same in the threads of a quad."""
        warp = GROUPS * self.width
        replicated = fragmented_array.Replicated(QUAD)
        return _layout(((self.channels,), (warp,), (self.width,)), (-3,), (-2, replicated), -1)

    @functools.cached_property
    def column(self):
        """Of ``[16]``, the same in all threads that hold the same states."""
        return self.both.reduce(0)

    @functools.cached_property
    def tokens(self):
        """Of ``[4, channels]``, a token a thread of the quad."""
        warp = GROUPS * self.width
        return _layout(((QUAD, self.channels), (1, warp), (1, self.width)), (-5,), (-3, -6), -1)

    @functools.cached_property
    def line(self):
        """Of ``[4, 32]``, warps and their threads."""
        return plgpu.Layout.WG_STRIDED((WARPS, LANES), vec_size=1)

    @functools.cached_property
    def spread(self):
        """``[channels]`` -> ``[channels, 16]``."""

        @plgpu.inline_mgpu(arg_types=(self.row,), return_type=self._of((self.channels, STATES), self.both))
        def spread(_, row):
            pair = row.registers.flat[0]
            held = ir.VectorType.get((HELD,), ir.F32Type.get())
            return self._array(self.both, [vector.broadcast(held, _element(pair, v)) for v in range(self.width)],
                               (self.channels, STATES))  # fmt: skip

        return spread

    @functools.cached_property
    def sum_states(self):
        """Four ``[channels, 16]``, one a token -> ``[4, channels]``."""

        @plgpu.inline_mgpu(arg_types=(self.both,) * QUAD, return_type=self._of((QUAD, self.channels), self.tokens))
        def sum_states(_, *tokens):
            sums = [[_sum(register, HELD) for register in token.registers.flat] for token in tokens]
            (mine,) = _scatter(sums, (2, 1))
            held = vector.from_elements(ir.VectorType.get((self.width,), ir.F32Type.get()), mine)
            return self._array(self.tokens, [held], (QUAD, self.channels))

        return sum_states

    @functools.cached_property
    def sum_channels(self):
        """Two ``[channels, 16]`` -> sums over each warp's channels, ``[4, 32]``, where `places` says."""

        @plgpu.inline_mgpu(arg_types=(self.both,) * 2, return_type=self._of((WARPS, LANES), self.line))
        def sum_channels(_, *arrays):
            sums = []
            for array in arrays:
                total = functools.reduce(_add, array.registers.flat)
                sums += [[_element(total, k)] for k in range(HELD)]
            ((mine,),) = _scatter(sums, (4, 8, 16))
            held = vector.from_elements(ir.VectorType.get((1,), ir.F32Type.get()), [mine])
            return mgpu.FragmentedArray(
                _registers=np.array([held], dtype=object), _layout=self.line.to_mgpu(), _is_signed=None
            )

        return sum_channels

    def _of(self, shape, layout):
        return plgpu.ShapeDtypeStruct(shape, F32, layout=layout)

    def _array(self, layout, registers, shape):
        layout = layout.to_mgpu()
        held = np.empty(len(registers), dtype=object)
        held[:] = registers
        return mgpu.FragmentedArray(
            _registers=held.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
        )


def places() -> np.ndarray:
    """Of `sum_channels`: int ``[2, 16]``, where in a warp's 32 numbers the sum of each of two arrays' states stands."""
    found = np.empty((2, STATES), np.int32)
    for which, state in np.ndindex(2, STATES):
        value, place = which * HELD + state % HELD, 0  # of the 8 values of a thread, halved thrice
        for step, half in ((4, 4), (8, 2), (16, 1)):
            place += step * (value // half % 2)
        found[which, state] = place + state // HELD
    return found


def _i32(value: int):
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _element(register, k: int):
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([k]))


def _add(a, b):
    """a + b, one instruction with a product that is added."""
    return arith.addf(a, b, fastmath=arith.FastMathFlags.contract)


def _sum(register, n: int):
    return functools.reduce(_add, [_element(register, k) for k in range(n)])


def _shuffle(value, distance: int):
    """The value of the thread whose lane differs in the bit `distance`."""
    i32 = ir.IntegerType.get_signless(32)
    mask = mgpu.c(0xFFFFFFFF, i32)
    moved = nvvm.shfl_sync(mask, arith.bitcast(i32, value), _i32(distance), _i32(31), nvvm.ShflKind.bfly)
    return arith.bitcast(ir.F32Type.get(), moved)


def _scatter(values: list[list], distances: tuple[int, ...]) -> list[list]:
    """Sums over the lanes at `distances`, each half of the list given to the lanes without and with the bit."""
    lane = arith.remui(mgpu.thread_idx(), _i32(LANES))
    for distance in distances:
        upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, _i32(distance)), _i32(0))
        half = len(values) // 2
        summed = []
        for low, high in zip(values[:half], values[half:], strict=True):
            kept = []
            for a, b in zip(low, high, strict=True):
                sent = arith.select(upper, a, b)
                kept.append(_add(arith.select(upper, b, a), _shuffle(sent, distance)))
            summed.append(kept)
        values = summed
    return values
