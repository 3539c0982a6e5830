# SPDX-License-Identifier: Apache-2.0
"""Copies between HBM and VMEM for the forward TPU kernel, two grid steps ahead of the arithmetic.

Pallas' own pipeline holds two blocks of an array: the copy of the next block starts with a step and has to end with it,
so the memory stands still for the latency of a copy in every step. Here four blocks are held. Loads start two steps
ahead and within the arithmetic, where scalar instructions cost nothing, and outputs leave chunk by chunk.

One semaphore counts the bytes of all loads of a slot, one those of its stores.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ops.ssd.tpu.common import CHUNK, Blocks

STREAMED = ("x", "dt", "decay", "B", "C", "documents")  # a block each grid step
RESIDENT = ("A", "D", "strong")  # a block each row and head block
SLOT_BYTES = 2 * 2**20  # of a block of x, up to which four blocks of it and of y are held, else two


def n_slots(tokens: int, channels: int, dtype) -> int:
    """Blocks held of each array, a power of two."""
    return 4 if tokens * channels * jnp.dtype(dtype).itemsize <= SLOT_BYTES else 2


def scratch_shapes(inputs: dict, blocks: Blocks) -> dict:
    """Slots and semaphores by name; inputs: {name: array}, of which those named above are copied."""
    lanes = blocks.groups * blocks.state
    slots = n_slots(blocks.tokens, blocks.channels, inputs["x"].dtype)
    sizes = {
        "x": (blocks.tokens, blocks.channels),
        "dt": (1, blocks.heads, blocks.tokens),
        "decay": (1, blocks.heads, blocks.tokens),
        "B": (blocks.tokens, lanes),
        "C": (blocks.tokens, lanes),
        "documents": (8, blocks.tokens),
    }
    scratch = {
        "y slots": pltpu.VMEM((slots, *sizes["x"]), inputs["x"].dtype),
        "resident loads": pltpu.SemaphoreType.DMA((1,)),
        "loads": pltpu.SemaphoreType.DMA((slots,)),
        "stores": pltpu.SemaphoreType.DMA((slots,)),
    }
    for name in STREAMED:
        if name in inputs:
            scratch[f"{name} slots"] = pltpu.VMEM((slots, *sizes[name]), inputs[name].dtype)
    for name in RESIDENT:
        if name in inputs:
            space = pltpu.SMEM if name == "strong" else pltpu.VMEM
            scratch[f"{name} slot"] = space((1, *inputs[name].shape[1:]), inputs[name].dtype)
    return scratch


class Copies:
    """The copies of one grid step (row, head block, step), methods in the order in which a step calls them."""

    def __init__(self, refs: dict, blocks: Blocks):
        self.refs, self.blocks = refs, blocks
        self.row, self.block, self.step = (pl.program_id(axis) for axis in range(3))
        self.steps = pl.num_programs(2)
        self.slots = refs["y slots"].shape[0]
        self.distance = self.slots // 2  # steps that loads are ahead

    def _slot(self, step):
        return step & (self.slots - 1)

    def _lanes(self, name):
        """The lanes of an array [B, T, lanes] that belong to the head block."""
        blocks, lanes = self.blocks, self.refs[name].shape[-1]
        size = blocks.groups * blocks.state if name in ("B", "C") else blocks.channels
        if lanes == size:
            return slice(None)
        n_blocks = self.refs["x"].shape[-1] // blocks.channels
        return pl.ds(pl.multiple_of(lax.div(self.block, n_blocks // (lanes // size)) * size, size), size)

    def _load(self, name, step):
        tokens = pl.ds(pl.multiple_of(step * self.blocks.tokens, self.blocks.tokens), self.blocks.tokens)
        array, slot = self.refs[name], self._slot(step)
        if name in ("dt", "decay"):
            source = array.at[self.row, pl.ds(self.block, 1), :, tokens]
        elif name == "documents":
            source = array.at[self.row, :, tokens]
        else:
            source = array.at[self.row, tokens, self._lanes(name)]
        return pltpu.make_async_copy(source, self.refs[f"{name} slots"].at[slot], self.refs["loads"].at[slot])

    def _loads(self, step) -> list:
        return [self._load(name, step) for name in STREAMED if name in self.refs]

    def _resident_load(self, name):
        block = self.row * pl.num_programs(1) + self.block if name == "strong" else self.block
        source, target = self.refs[name].at[pl.ds(block, 1)], self.refs[f"{name} slot"]
        return pltpu.make_async_copy(source, target, self.refs["resident loads"].at[0])

    def _store(self, step, chunk):
        tokens = pl.ds(pl.multiple_of(step * self.blocks.tokens + chunk * CHUNK, CHUNK), CHUNK)
        source = self.refs["y slots"].at[self._slot(step), pl.ds(chunk * CHUNK, CHUNK)]
        target = self.refs["y"].at[self.row, tokens, self._lanes("y")]
        return pltpu.make_async_copy(source, target, self.refs["stores"].at[self._slot(step)])

    def _wait_for_stores(self, step):
        for chunk in range(self.blocks.chunks):
            self._store(step, chunk).wait()

    def first_loads(self) -> list:
        """In a row's first step: starts what it needs."""
        loads = [self._resident_load(name) for name in RESIDENT if name in self.refs] + self._loads(0)
        for copy in loads:
            copy.start()
        return loads

    def wait_for_first(self, loads: list):
        """In a row's first step: waits for `first_loads`, then starts the loads of the steps up to the distance.

        Not before, for copies share the bandwidth.
        """
        for copy in loads:
            copy.wait()
        for step in range(1, self.distance):

            @pl.when(step < self.steps)
            def _(step=step):
                for copy in self._loads(step):
                    copy.start()

    def arrive(self) -> dict:
        """Waits for the step's inputs and for room for its output; the refs, blocks in place of whole arrays."""

        @pl.when(self.step > 0)
        def _():
            for copy in self._loads(self.step):
                copy.wait()

        @pl.when(self.step >= self.slots)
        def _():
            self._wait_for_stores(self.step - self.slots)

        slot = pl.ds(self._slot(self.step), 1)
        blocks = {name: self.refs[f"{name} slots"].at[slot] for name in (*STREAMED, "y") if name in self.refs}
        residents = {name: self.refs[f"{name} slot"] for name in RESIDENT if name in self.refs}
        return {**self.refs, **blocks, **residents}

    def load_ahead(self):
        """Starts the loads of a later step."""
        step = self.step + self.distance

        @pl.when(step < self.steps)
        def _():
            for copy in self._loads(step):
                copy.start()

    def store(self, chunk: int):
        """Starts the store of a chunk of the output."""
        self._store(self.step, chunk).start()

    def finish(self):
        """In a row's last step: waits for the stores on their way."""

        @pl.when(self.step == self.steps - 1)
        def _():
            for back in reversed(range(self.slots)):

                @pl.when(self.step >= back)
                def _(back=back):
                    self._wait_for_stores(self.step - back)
