# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel of the attention forward: online softmax, masks by key ranges, gate in the epilogue.

A thread block works on one tile after the other: 64 query rows a compute warpgroup, of one head. A producer warpgroup
streams key and value blocks through shared memory by TMA, those of the next tile while this one ends. Each compute
warpgroup starts the scores of the next key block and the product of the current weights with v together, and does the
softmax of the former while the latter runs (Shah et al. 2024, arXiv:2407.08608, section 3.2); the warpgroups take turns
at starting products.

Row t sees the keys with ``start_t <= position < end_t`` (position: the index where none are given) and an id equal to
its own. Per query block, ``ranges`` holds (lo, a, b, hi): key blocks lo..hi are visited, a..b without masks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import (
    BF16_TRANSFORMS,
    COL,
    F32,
    LANE_PARAMS,
    LOG2E,
    ROW,
    TILE,
    accumulate,
    drain,
    load_tile,
    named_body,
    rows_of,
    sums_of,
    zeros,
)
from pallas_kernels.ops.attention.gpu.common import capped, visible
from pallas_kernels.ops.attention.mask import LOWEST

# Of a thread of the compute warpgroups and of the producer, by the number of the former.
REGISTERS = {2: (240, 24), 3: (160, 32)}


@dataclasses.dataclass(frozen=True)
class Forward:
    """Static description of one forward kernel."""

    batch: int
    heads: int
    kv_heads: int
    width: int  # of q, k and v: 64, 128, 192 or 256
    queries: int
    keys: int
    scale: float
    softcap: float | None
    gate: str | None = None  # None, "elementwise" or "head"
    sinks: bool = False
    ids: bool = False  # documents: bounds and keys hold ids
    positions: bool = False  # keys hold positions
    masks_batch: bool = False  # ranges, bounds and keys differ between rows of the batch
    first_masked: bool = True  # key blocks before those without masks can exist
    last_masked: bool = True  # and behind them
    save: bool = False  # store the log-sum-exp, and under a gate the ungated output, for the backward
    alternate: bool = True  # warpgroups take turns
    few: bool = False  # one compute warpgroup
    stacked: bool = False  # k and v hold more rows: those of the batch begin at `first`
    v_head: int = 0  # first of v's heads within its array
    parts: int = 1  # a tile takes one key block in so many; results of the parts are rows of the batch
    dtype: jnp.dtype = jnp.bfloat16
    stages: int = 2
    multiprocessors: int | None = None  # at most so many thread blocks; None: one a tile

    replace = dataclasses.replace

    @property
    def warpgroups(self) -> int:
        return 1 if self.few else 3 if self.width == 64 else 2

    @property
    def block_q(self) -> int:
        return TILE * self.warpgroups

    @property
    def block_k(self) -> int:
        return 128 if self.width <= 128 else 64

    @property
    def key_rows(self) -> int:
        return self.ids + self.positions

    @property
    def save_ungated(self) -> bool:
        return self.save and self.gate is not None

    @property
    def q_slots(self) -> int:
        return 2 if self.width <= 128 else 1

    @property
    def tiles(self) -> int:
        return self.blocks * self.batch * self.parts * self.heads

    @property
    def programs(self) -> int:
        return min(self.multiprocessors or self.tiles, self.tiles)

    @property
    def blocks(self) -> int:
        return -(-self.queries // self.block_q)


def _scores(cfg, raw, base, bounds, keys, masked: bool):
    """(scores with hidden ones at -inf, factor that brings them to units of log2)."""
    factor = cfg.scale * LOG2E
    if cfg.softcap is not None or factor < 0:
        raw, factor = capped(raw, cfg.scale, cfg.softcap)[0], 1.0
    if masked:
        keys = [plgpu.load(keys.at[i], layout=COL) for i in range(cfg.key_rows)]
        raw = jnp.where(visible(cfg, base, bounds, keys, 1, raw.shape), raw, -jnp.inf)
    return raw, factor


def _softmax(cfg, scores, factor, top, total):
    """(float32 weights, new maximum, factor of what was summed before, new total)."""
    new_top = jnp.maximum(top, jnp.max(scores, axis=1) * factor)
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores * factor - rows_of(new_top, cfg.block_k))
    total = total * shrink + jnp.sum(weights, axis=1)
    return weights, new_top, shrink, total


class _Turns:
    """Lets one compute warpgroup at a time start products: each waits for its own barrier and wakes the next."""

    def __init__(self, cfg, barriers, wg):
        self.cfg, self.barriers, self.wg = cfg, barriers, wg

    def wait(self):
        if self.cfg.alternate:
            plgpu.barrier_wait(self.barriers.at[self.wg])

    def wake(self):
        if self.cfg.alternate:
            plgpu.barrier_arrive(self.barriers.at[lax.rem(self.wg + 1, self.cfg.warpgroups)])

    def begin(self):
        """The first warpgroup's first turn."""
        if self.cfg.alternate:

            @pl.when(self.wg == self.cfg.warpgroups - 1)
            def _():
                plgpu.barrier_arrive(self.barriers.at[0])

    def finish(self):
        """Takes the last wake-up, so that every arrival is observed."""
        if self.cfg.alternate:

            @pl.when(self.wg == 0)
            def _():
                plgpu.barrier_wait(self.barriers.at[0])


class _Tile:
    """Which tile the thread block works on in its round `number`, and the key blocks that it sees."""

    def __init__(self, cfg, refs, number):
        # Under a causal mask the last query blocks are the longest: those first, in rounds of alternating direction.
        program = lax.axis_index("program")
        turned = jnp.where(lax.rem(number, 2) == 0, program, cfg.programs - 1 - program)
        index = jnp.minimum(number * cfg.programs + turned, cfg.tiles - 1)
        per_block = cfg.batch * cfg.parts * cfg.heads
        self.block = cfg.blocks - 1 - lax.div(index, per_block)
        rest = lax.rem(index, per_block)
        self.row, self.head = lax.div(rest, cfg.heads), lax.rem(rest, cfg.heads)
        self.parts, self.batch = cfg.parts, lax.div(self.row, cfg.parts)
        self.mask_row = self.batch if cfg.masks_batch else 0
        self.ranges = tuple(refs["ranges"][self.mask_row, self.block, i] for i in range(4))
        if cfg.parts > 1:
            lo, a, b, hi = (self._own(limit) for limit in self.ranges)
            lo = jnp.where(lo < hi, lo, 0)  # at least one block, here one that is hidden
            self.ranges = (lo, jnp.maximum(a, lo), jnp.maximum(b, lo), jnp.maximum(hi, lo + 1))

    def _own(self, limit):
        """How many of the key blocks before `limit` belong to this part."""
        return lax.div(jnp.maximum(limit - lax.rem(self.row, self.parts) + self.parts - 1, 0), self.parts)

    def key_block(self, j):
        """Where the tile's j-th key block stands among all."""
        return j if self.parts == 1 else j * self.parts + lax.rem(self.row, self.parts)

    def rows(self, cfg, wg):
        return pl.ds(self.block * cfg.block_q + wg * TILE, TILE)


def _count_tiles(cfg):
    """Tiles of this thread block."""
    full, rest = divmod(cfg.tiles, cfg.programs)
    if not rest:
        return jnp.int32(full)
    program = lax.axis_index("program")
    turned = program if full % 2 == 0 else cfg.programs - 1 - program
    return full + (turned < rest).astype(jnp.int32)


def _compute(cfg, refs, smem, bars, wg):
    q_s, (q_bar, _), turns = smem[0], bars[:2], _Turns(cfg, bars[-1], wg)
    n_tiles = _count_tiles(cfg)

    def load_q(number, slot):
        @pl.when(number < n_tiles)
        def _():
            tile = _Tile(cfg, refs, number)
            source = refs["q"].at[tile.batch, tile.rows(cfg, wg), tile.head]
            plgpu.copy_gmem_to_smem(source, q_s.at[slot, wg], q_bar.at[slot * cfg.warpgroups + wg])

    def tile(number, count):
        return _compute_tile(cfg, _Tile(cfg, refs, number), refs, smem, bars, wg, turns, number, count, load_q)

    load_q(jnp.int32(0), 0)
    turns.begin()
    lax.fori_loop(0, n_tiles, tile, jnp.int32(0))
    turns.finish()
    plgpu.wait_smem_to_gmem(0)


class _Walk:
    """The online softmax of one tile over its key blocks lo..hi; `count` key blocks came before it."""

    def __init__(self, cfg, tile, q_ref, smem, bars, turns, bounds, count):
        self.cfg, self.tile, self.q_ref, self.turns, self.bounds = cfg, tile, q_ref, turns, bounds
        _, self.k_s, self.v_s, self.keys_s, _ = smem
        _, _, self.k_full, self.v_full, self.k_empty, self.v_empty, _ = bars
        self.count = count

    def slot(self, j):
        return lax.rem(self.count + j - self.tile.ranges[0], self.cfg.stages)

    def soften(self, raw, j, top, total, masked: bool):
        """`_softmax` of block j; lets go of its ids and positions."""
        cfg, slot = self.cfg, self.slot
        keys = self.keys_s.at[slot(j)] if masked and cfg.key_rows else None
        scores, factor = _scores(cfg, raw, self.tile.key_block(j) * cfg.block_k, self.bounds, keys, masked)
        if keys is not None:
            plgpu.barrier_arrive(self.k_empty.at[slot(j)])
        return _softmax(cfg, scores, factor, top, total)

    def release_k(self, j, masked: bool):
        if not (masked and self.cfg.key_rows):
            plgpu.barrier_arrive(self.k_empty.at[self.slot(j)])

    def start(self, top, total):
        """The first block: (weights in float32, top, total)."""
        lo = self.tile.ranges[0]
        plgpu.barrier_wait(self.k_full.at[self.slot(lo)])
        self.turns.wait()

        def product(acc):
            plgpu.wgmma(acc, self.q_ref, self.k_s.at[self.slot(lo)].T)
            self.turns.wake()
            return acc[...]

        raw = accumulate(product, self.cfg.block_k)
        self.release_k(lo, True)
        weights, top, _, total = self.soften(raw, lo, top, total, True)
        return weights, top, total

    def step(self, j, carry, masked: bool):
        """Scores of block j while the product of the weights of the block before with its values runs."""
        cfg, slot, turns = self.cfg, self.slot, self.turns
        out, weights, top, total = carry
        plgpu.barrier_wait(self.k_full.at[slot(j)])
        turns.wait()

        def overlapped(raw_acc, out_acc):
            out_acc[...] = out
            plgpu.wgmma(raw_acc, self.q_ref, self.k_s.at[slot(j)].T)
            plgpu.barrier_wait(self.v_full.at[slot(j - 1)])
            plgpu.wgmma(out_acc, weights, self.v_s.at[slot(j - 1)])
            turns.wake()
            raw = lax.optimization_barrier(sums_of(raw_acc, 1))
            self.release_k(j, masked)
            new = self.soften(raw, j, top, total, masked)
            new = lax.optimization_barrier(new)
            return out_acc[...], new

        out, (weights, top, shrink, total) = accumulate(overlapped, cfg.block_k, cfg.width)
        plgpu.barrier_arrive(self.v_empty.at[slot(j - 1)])
        # Rounded only now: the operand registers of a product must not be written while one is in flight.
        return out * rows_of(shrink, cfg.width), weights.astype(cfg.dtype), top, total

    def steps(self, carry):
        """All blocks behind the first, those without masks in a loop of their own."""
        cfg, (lo, a, b, hi) = self.cfg, self.tile.ranges
        begin = lo + 1
        if cfg.first_masked:
            middle = jnp.maximum(a, begin)
            carry = lax.fori_loop(begin, middle, functools.partial(self.step, masked=True), carry)
            begin = middle
        middle = jnp.maximum(b, begin)
        carry = lax.fori_loop(begin, middle, functools.partial(self.step, masked=False), carry)
        if cfg.last_masked:
            carry = lax.fori_loop(middle, hi, functools.partial(self.step, masked=True), carry)
        return carry

    def finish(self, out, weights):
        """out with the last block's values."""
        hi = self.tile.ranges[3]
        plgpu.barrier_wait(self.v_full.at[self.slot(hi - 1)])
        self.turns.wait()

        def product(acc):
            plgpu.wgmma(acc, weights, self.v_s.at[self.slot(hi - 1)])
            self.turns.wake()

        out = pl.run_state(product)(plgpu.ACC.init(out))
        plgpu.barrier_arrive(self.v_empty.at[self.slot(hi - 1)])
        return out


def _compute_tile(cfg, tile, refs, smem, bars, wg, turns, number, count, load_q):
    """One tile; count is the number of key blocks before it, returned with its own added."""
    q_s, lse_s = smem[0], smem[4]
    q_bar, gate_bar = bars[:2]
    lo, _, _, hi = tile.ranges
    q_slot = lax.rem(number, cfg.q_slots)
    q_ref = q_s.at[q_slot, wg]
    place = (tile.row, tile.rows(cfg, wg), tile.head)
    bounds = tuple(
        plgpu.load(refs["bounds"].at[tile.mask_row, i, place[1]], layout=ROW, optimized=False)
        for i in range(2 + cfg.ids)
    )
    walk = _Walk(cfg, tile, q_ref, smem, bars, turns, bounds, count)

    top = jnp.full((TILE,), LOWEST, F32)
    total = jnp.zeros((TILE,), F32)
    if cfg.sinks:
        top, total = jnp.full((TILE,), refs["sinks"][tile.head], F32), jnp.ones((TILE,), F32)
    top, total = plgpu.layout_cast(top, ROW), plgpu.layout_cast(total, ROW)

    plgpu.barrier_wait(q_bar.at[q_slot * cfg.warpgroups + wg])
    weights, top, total = walk.start(top, total)
    out = zeros(cfg.width)
    out, weights, top, total = walk.steps((out, weights.astype(cfg.dtype), top, total))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left shared memory, no warp reads q
    if cfg.gate == "elementwise":
        plgpu.copy_gmem_to_smem(refs["gate"].at[place], q_ref, gate_bar.at[wg])
    if cfg.q_slots == 2 and not cfg.save_ungated:
        load_q(number + 1, 1 - q_slot)
    out = walk.finish(out, weights)
    spare_ref = q_s.at[1 - q_slot, wg] if cfg.q_slots == 2 else q_ref
    _finish(cfg, refs, place, (q_ref, gate_bar.at[wg], spare_ref, lse_s.at[wg] if cfg.save else None), out, top, total)
    if cfg.q_slots == 1:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        load_q(number + 1, 0)
    elif cfg.save_ungated:
        plgpu.wait_smem_to_gmem(2, wait_read_only=True)
        load_q(number + 1, 1 - q_slot)
    return count + hi - lo


def _finish(cfg, refs, place, own, out, top, total):
    """Normalises, applies the gate and starts storing out and the log-sum-exp (units of log2)."""
    q_ref, bar, spare_ref, lse_ref = own
    batch, rows, head = place
    out *= rows_of(jnp.where(total > 0.0, 1.0 / total, 0.0), cfg.width)
    gate = None
    if cfg.gate == "head":
        gate = plgpu.load(refs["gate"].at[batch, head, rows], layout=ROW, optimized=False)
        gate = rows_of(1.0 / (1.0 + jnp.exp2(gate * -LOG2E)), cfg.width)
    elif cfg.gate is not None:
        plgpu.barrier_wait(bar)
        gate = 1.0 / (1.0 + jnp.exp2(load_tile(q_ref) * -LOG2E))
    if cfg.save_ungated:
        spare_ref[...] = out.astype(cfg.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(spare_ref, refs["ungated"].at[place])
        if cfg.q_slots == 1:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    q_ref[...] = (out if gate is None else out * gate).astype(cfg.dtype)
    if cfg.save:
        lse_ref[...] = jnp.where(total > 0.0, top + jnp.log2(total), jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_ref, refs["out"].at[place])
    if cfg.save:
        plgpu.copy_smem_to_gmem(lse_ref, refs["lse"].at[batch, head, rows])


def _produce(cfg, refs, smem, bars):
    _, k_s, v_s, keys_s, _ = smem
    _, _, k_full, v_full, k_empty, v_empty, _ = bars
    first = refs["first"][0] if cfg.stacked else 0

    def produce_tile(number, count):
        tile = _Tile(cfg, refs, number)
        lo, _, _, hi = tile.ranges
        kv_head = lax.div(tile.head, cfg.heads // cfg.kv_heads)

        def copy(name, buffer, full, empty, i):
            slot = lax.rem(count + i, cfg.stages)

            @pl.when(count + i >= cfg.stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            rows = pl.ds(tile.key_block(lo + i) * cfg.block_k, cfg.block_k)
            head = kv_head + (cfg.v_head if name == "v" else 0)
            plgpu.copy_gmem_to_smem(refs[name].at[first + tile.batch, rows, head], buffer.at[slot], full.at[slot])
            if name == "k" and cfg.key_rows:
                plgpu.copy_gmem_to_smem(refs["keys"].at[tile.mask_row, :, rows], keys_s.at[slot], full.at[slot])

        def step(i, _):
            copy("k", k_s, k_full, k_empty, i)
            copy("v", v_s, v_full, v_empty, i - 1)
            return None

        copy("k", k_s, k_full, k_empty, jnp.int32(0))
        lax.fori_loop(1, hi - lo, step, None)
        copy("v", v_s, v_full, v_empty, hi - lo - 1)
        return count + hi - lo

    steps = lax.fori_loop(0, _count_tiles(cfg), produce_tile, jnp.int32(0))
    drain(steps, cfg.stages, (k_empty, v_empty))


def _body(cfg, *flat):
    names = ["q", "k", "v", "bounds", "ranges"] + ["first"] * cfg.stacked + ["keys"] * (cfg.key_rows > 0)
    names += ["sinks"] * cfg.sinks + ["gate"] * (cfg.gate is not None) + ["out"]
    names += ["lse"] * cfg.save + ["ungated"] * cfg.save_ungated
    refs = dict(zip(names, flat))
    wg = lax.axis_index("wg")
    wgs, s = cfg.warpgroups, cfg.stages
    tile = functools.partial(plgpu.SMEM, dtype=cfg.dtype, transforms=BF16_TRANSFORMS)
    scratch = [
        tile((cfg.q_slots, wgs, TILE, cfg.width)),
        tile((s, cfg.block_k, cfg.width)),
        tile((s, cfg.block_k, cfg.width)),
        plgpu.SMEM((s, cfg.key_rows, cfg.block_k), jnp.int32) if cfg.key_rows else None,
        plgpu.SMEM((wgs, TILE), F32) if cfg.save else None,
    ]

    def scoped(smem, *bars):
        @pl.when(wg < wgs)
        def _():
            if not cfg.few:
                plgpu.set_max_registers(REGISTERS[wgs][0], action="increase")
            _compute(cfg, refs, smem, bars, wg)

        @pl.when(wg == wgs)
        def _():
            if not cfg.few:
                plgpu.set_max_registers(REGISTERS[wgs][1], action="decrease")
            _produce(cfg, refs, smem, bars)

    pl.run_scoped(
        scoped,
        scratch,
        plgpu.Barrier(num_barriers=cfg.q_slots * wgs),
        plgpu.Barrier(num_barriers=wgs),
        plgpu.Barrier(num_arrivals=1 + (cfg.key_rows > 0), num_barriers=s),
        plgpu.Barrier(num_barriers=s),
        plgpu.Barrier(num_arrivals=wgs, num_barriers=s),
        plgpu.Barrier(num_arrivals=wgs, num_barriers=s),
        plgpu.Barrier(num_barriers=wgs),
        collective_axes="wg",
    )


def forward(cfg, q, k, v, bounds, ranges, keys, sinks, gate, first=None):
    """Run the forward kernel: [out], [out, lse] or [out, lse, ungated out].

    q ``[B, T, H, P]``; k, v ``[B, S, K, P]``, or v the heads from cfg.v_head on of more;
    bounds ``[B or 1, 2 or 3, blocks * block_q]`` int32: start,
    end (, id); ranges ``[B or 1, blocks, 4]`` int32; keys ``[B or 1, key_rows, S to a multiple of block_k]``
    int32: ids, positions; sinks ``[H]`` in units of log2; gate like q or ``[B, H, blocks * block_q]`` float32;
    lse ``[B, H, blocks * block_q]``, +inf where nothing is visible. Results of several parts are rows
    b * parts + part of ``[B * parts, ...]``; then without gate and sinks. first ``[1]`` int32, if cfg.stacked.
    """
    rows = cfg.batch * cfg.parts
    out = [jax.ShapeDtypeStruct((rows, *q.shape[1:]), q.dtype)]
    if cfg.save:
        out.append(jax.ShapeDtypeStruct((rows, cfg.heads, cfg.blocks * cfg.block_q), F32))
    if cfg.save_ungated:
        out.append(jax.ShapeDtypeStruct(q.shape, q.dtype))
    kernel = plgpu.kernel(
        named_body("attention_forward", _body, cfg),
        out_type=out,
        grid=(cfg.programs,),
        grid_names=("program",),
        num_threads=cfg.warpgroups + 1,
        thread_name="wg",
        # No thread reads and writes the same shared memory but a warp its own rows of q_s, in order: no barriers needed
        # beside those of commits and waits.
        compiler_params=LANE_PARAMS,
    )
    given = ((first, cfg.stacked), (keys, cfg.key_rows), (sinks, cfg.sinks), (gate, cfg.gate))
    return kernel(q, k, v, bounds, ranges, *[array for array, wanted in given if wanted])
