# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel of the SSD backward: all gradients of one tile of 64 tokens, given the chunk states.

A thread block owns the tile ``half`` of one span of 128 tokens and loops over the heads of a group, so that dB and dC
are summed over heads in registers. With ``h`` the state at the span's start, ``R`` the gradient of the state at its
end, ``W_ij = dt_j exp2(a_i - a_j)``, ``M_ij = (C_i . B_j) W_ij`` rounded to bfloat16 (zero unless i >= j), ``e_i``
the decay from the span's start to i and ``u_j`` that from j to its end, times dt_j,

    v_j = sum_i M_ij dy_i + u_j R B_j          dx_j = v_j + D dy_j          y_i = sum_j M_ij x_j + e_i h C_i
    dB_j = sum_heads sum_i dS_ij C_i + u_j x_j R                            dS_ij = W_ij (dy_i . x_j)
    dC_i = sum_heads sum_j dS_ij B_j + e_i dy_i h

and the sums ``x_j . v_j``, ``dy_i . y_i`` from which ``gpu_decay`` forms ddt and dA. Both sums use the same rounded M,
so what does not cross a token cancels to float32 accuracy. A dt below 2^-64 counts as 2^-64, so that
ddt = x . v / dt + ... holds for 0.

Four warpgroups: ``source`` (pair terms, dx), ``target`` (y, dC), ``db`` and a producer that streams the heads' tiles
through shared memory. Pairs are kept transposed ([j, i]), so that the product with dy takes M from registers.
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
    F32_TRANSFORMS,
    LANE_PARAMS,
    ROW,
    TILE,
    WGMMA,
    accumulate,
    clear_rows,
    cols_of,
    in_one_warp,
    keep_upper,
    load_tile,
    loop_with,
    named_body,
    rows_of,
    sums_of,
    zeros,
)
from pallas_kernels.ops.ssd.gpu.decay import SMALLEST_DT_EXPONENT
from pallas_kernels.varying import call_varying

LARGEST = 126.0  # log2 of the largest weight of a pair that is masked afterwards
# Of a thread of the warpgroups source, target, db and the producer. Other splits of the same sum make ptxas run all
# matrix products one by one (C7512): look at its output after any change.
REGISTERS = (216, 152, 120, 24)


@dataclasses.dataclass(frozen=True)
class Grads:
    """Static description of the gradient kernel."""

    batch: int
    heads: int
    groups: int
    state: int  # columns of the states this kernel takes, at most 128
    chunks: int  # chunks of TILE tokens, even
    multiprocessors: int
    splits: int = 1  # parts of a group's heads visited by different thread blocks
    segments: bool = False
    has_d: bool = False
    stages: int = 2
    dtype: jnp.dtype = jnp.bfloat16
    column: int = 0  # the first of these columns
    pairs: bool = True  # with the terms of pairs of tokens; without: only what goes through the states
    whole: bool = True  # these are all columns; else the scores are given and dS is an output
    wide: bool = False  # gradients of B are not rounded
    alone: int = 0  # as of the walk

    @property
    def block_heads(self) -> int:
        return self.heads // (self.groups * self.splits)

    @property
    def given_scores(self) -> bool:
        return self.pairs and not self.whole

    @property
    def db_dtype(self):
        """One part is the gradient itself."""
        return self.dtype if self.splits == 1 and self.whole and not self.wide else F32

    def tiles(self, k) -> int:
        """Pairs of tiles that end in or start from tile ``k`` of a span, here."""
        return (2 - k) * self.pairs


class _Tokens:
    """Decays of the tile ``half`` of one head, read from shared memory."""

    def __init__(self, smem, slot, half):
        self.half = half
        self.ab, self.slot = smem["ab"], slot

    def a(self, layout=ROW, half=None):
        return plgpu.load(self.ab.at[self.slot, self.half if half is None else half, 0], layout=layout, optimized=False)

    def b(self):
        """a - log2(dt)"""
        b = plgpu.load(self.ab.at[self.slot, self.half, 1], layout=ROW, optimized=False)
        return jnp.minimum(b, self.a() + SMALLEST_DT_EXPONENT)

    def end(self, half):
        return self.ab[self.slot, half, 0, TILE - 1]

    def through(self, half):
        """Decay across one whole tile."""
        return jnp.exp2(self.end(half))

    def to_end(self):
        """u_j: dt_j and the decay from token j to the end of the span."""
        u = jnp.exp2(self.end(self.half) - self.b())
        if self.half == 1:
            return u
        return u * self.through(1)

    def from_start(self):
        """e_i: decay from the start of the span to token i."""
        e = jnp.exp2(self.a())
        if self.half == 0:
            return e
        return e * self.through(0)


def _causal(cfg, pair, values):
    """``values`` [j, i] of the pairs within a tile (``pair`` 0) with j <= i, or from the first tile to the second."""
    return values if pair else keep_upper(values, cfg.alone)


def _when_padded(cfg, smem, work):
    """Calls ``work`` in a thread block whose span holds padding: rare, and costs the others a branch."""
    if cfg.segments:
        pl.when(jnp.minimum(smem["real"][0, 0], smem["real"][1, 0]) < 1.5)(work)


def _clear_padding(cfg, smem, *tiles):
    """Zeros on the padding of tiles ``([64 tokens, n], half)``, which may hold anything."""
    for tile, half in tiles:
        real = rows_of(plgpu.load(smem["real"].at[half], layout=ROW, optimized=False)) > 0.0
        clear_rows(tile, real, cfg.dtype)
    plgpu.commit_smem()


def _head_tiles(cfg, k, smem, slot):
    """Tiles of one head with tokens as rows, and their halves."""
    tiles = [(smem["x"].at[slot], k), (smem["dy"].at[slot, 0], k)]
    return tiles + [(smem["dy"].at[slot, 1], 1)] * (cfg.tiles(k) == 2)


def _source_head(cfg, k, carry, smem, slot, i, bars):
    """One head: its share of dS (transposed), dx, x . v and its part through the state."""
    tok = _Tokens(smem, slot, k)
    x_ref, dy_ref, dy1_ref = smem["x"].at[slot], smem["dy"].at[slot, 0], smem["dy"].at[slot, 1]

    def weight(pair):
        if pair == 0:
            return jnp.exp2(jnp.minimum(cols_of(tok.a(COL)) - rows_of(tok.b()), LARGEST))
        return cols_of(jnp.exp2(tok.a(COL, 1))) * rows_of(jnp.exp2(tok.end(0) - tok.b()))

    def mix(pair, weight, grad):
        scores = plgpu.load(smem["scores"].at[pair], layout=WGMMA)
        return scores * weight.astype(cfg.dtype), carry[pair] + weight * grad

    def store(pair, m):
        """Hands M to the target warpgroup."""
        if pair == 0:

            @pl.when(i > 0)
            def _():
                plgpu.barrier_wait(bars["m_empty"].at[0])

        smem["m"][pair] = m

    def within_tile(v, grad):
        plgpu.wgmma(grad, x_ref, dy_ref.T)
        plgpu.wgmma(v, smem["b"], smem["r"].at[slot].T)
        w = weight(0)
        return mix(0, w, sums_of(grad, 1))

    def through_state(v):
        part = sums_of(v) * rows_of(tok.to_end())
        return part, jnp.sum(load_tile(x_ref) * part, axis=1)

    def across(v, grad):
        plgpu.wgmma(grad, x_ref, dy1_ref.T)
        w = weight(1)
        m, new = mix(1, w, sums_of(grad))
        plgpu.wgmma(v, m, dy1_ref)
        store(1, m)
        return new

    def work(v):
        m, first = accumulate(functools.partial(within_tile, v), TILE)
        state_part, x_state = through_state(v)
        v[...] = state_part
        plgpu.wgmma(v, m, dy_ref)
        store(0, m)
        new = (first,)
        if k == 0:
            new += (accumulate(functools.partial(across, v), TILE),)
        plgpu.commit_smem()
        plgpu.barrier_arrive(bars["m_full"].at[0])
        return new, sums_of(v), x_state

    def states_alone(v):
        plgpu.wgmma(v, smem["b"], smem["r"].at[slot].T)
        return (), *through_state(v)

    new, v, x_state = accumulate(work if cfg.pairs else states_alone, TILE)
    x = load_tile(x_ref)
    vectors = [jnp.sum(x * v, axis=1), x_state]
    if cfg.has_d:
        dy = load_tile(dy_ref)
        vectors.append(jnp.sum(x * dy, axis=1))
        v += dy * cols_of(plgpu.load(smem["d"].at[slot], layout=COL, optimized=False))
    return new, v, vectors


def _source_warpgroup(cfg, k, idx, outs, smem, bars):
    b, span, group, split, head0 = idx
    chunk = span * 2 + k
    clear = functools.partial(_clear_padding, cfg, smem, (smem["b"], k), (smem["c"], k), (smem["c1"], 1))
    _when_padded(cfg, smem, clear)
    for pair in range(cfg.tiles(k) if cfg.whole else 0):

        def scores(acc):
            plgpu.wgmma(acc, smem["b"], smem["c1" if pair else "c"].T)
            return sums_of(acc)

        smem["scores"][pair] = _causal(cfg, pair, accumulate(scores, TILE)).astype(cfg.dtype)
    plgpu.commit_smem()

    def step(i, carry):
        slot = lax.rem(i, cfg.stages)
        plgpu.barrier_wait(bars["full"].at[slot])
        _when_padded(cfg, smem, lambda: plgpu.barrier_wait(bars["clean"].at[slot]))
        carry, dx, vectors = _source_head(cfg, k, carry, smem, slot, i, bars)
        plgpu.barrier_arrive(bars["empty"].at[slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem["out"][...] = dx.astype(cfg.dtype)
        for row, v in enumerate(vectors):
            smem["source"][row] = v
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["out"], outs["dx"].at[b, pl.ds(chunk * TILE, TILE), head0 + i])
        plgpu.copy_smem_to_gmem(smem["source"], outs["source"].at[b, chunk, head0 + i])
        return carry

    carry = lax.fori_loop(0, cfg.block_heads, step, (zeros(TILE),) * cfg.tiles(k))
    if cfg.pairs:
        plgpu.barrier_wait(bars["m_empty"].at[0])
        for pair, ds in enumerate(carry):
            smem["m"][pair] = _causal(cfg, pair, ds).astype(cfg.dtype)
        plgpu.commit_smem()
        if cfg.whole:
            plgpu.barrier_arrive(bars["ds_full"].at[0])
        else:
            plgpu.copy_smem_to_gmem(smem["m"], outs["d_s"].at[b, split, chunk, group])
    plgpu.wait_smem_to_gmem(0)


def _target_head(cfg, k, d_c, smem, slot, bars):
    """One head: its share of dC through the state; dy . y in the tile and from the first tile to the second."""
    tok = _Tokens(smem, slot, k)
    x_ref, dy_ref, h_ref = smem["x"].at[slot], smem["dy"].at[slot, 0], smem["h"].at[slot]
    e = tok.from_start()

    def within_tile(y):
        plgpu.wgmma(y, smem["c"], h_ref.T)
        part = sums_of(y) * rows_of(e)
        if not cfg.pairs:
            return jnp.sum(load_tile(dy_ref) * part, axis=1)
        plgpu.barrier_wait(bars["m_full"].at[0])
        y[...] = part
        plgpu.wgmma(y, smem["m"].at[0].T, x_ref)
        return jnp.sum(load_tile(dy_ref) * sums_of(y), axis=1)

    def across(cross):
        plgpu.wgmma(cross, smem["m"].at[1].T, x_ref)
        return jnp.sum(load_tile(smem["dy"].at[slot, 1]) * sums_of(cross), axis=1)

    plgpu.wgmma(d_c, plgpu.load(dy_ref, layout=WGMMA) * rows_of(e.astype(cfg.dtype)), h_ref)
    rows = [accumulate(within_tile, TILE)]
    if cfg.tiles(k) == 2:
        rows.append(accumulate(across, TILE))
    plgpu.wgmma_wait(0)
    if cfg.pairs:
        plgpu.barrier_arrive(bars["m_empty"].at[0])
    return rows


def _target_warpgroup(cfg, k, idx, outs, smem, bars):
    b, span, group, split, head0 = idx
    _when_padded(cfg, smem, lambda: _clear_padding(cfg, smem, (smem["c"], k)))  # as the other warpgroup does

    def step(i, d_c):
        slot = lax.rem(i, cfg.stages)
        plgpu.barrier_wait(bars["full"].at[slot])
        _when_padded(cfg, smem, lambda: plgpu.barrier_wait(bars["clean"].at[slot]))
        rows = _target_head(cfg, k, d_c, smem, slot, bars)
        plgpu.barrier_arrive(bars["empty"].at[slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for row, v in enumerate(rows):
            smem["target"][row] = v
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["target"].at[0], outs["target"].at[b, span * 2 + k, head0 + i])
        if cfg.tiles(k) == 2:
            plgpu.copy_smem_to_gmem(smem["target"].at[1], outs["cross"].at[b, span, head0 + i])

    def through_state(d_c):
        loop_with(d_c, cfg.block_heads, step)
        if cfg.pairs and cfg.whole:
            plgpu.barrier_wait(bars["ds_full"].at[0])
            plgpu.wgmma(d_c, smem["m"].at[0].T, smem["b"])
        return sums_of(d_c)

    def from_first_tile(d_c):
        plgpu.wgmma(d_c, smem["m"].at[1].T, smem["b"])
        return sums_of(d_c)

    def store(value, target):
        for n in range(0, cfg.state, TILE):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            smem["part"][...] = value[:, n : n + TILE]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem["part"], target.at[:, group, pl.ds(n, TILE)])

    store(accumulate(through_state, cfg.state), outs["d_c"].at[b, split, span * 2 + k])
    if cfg.tiles(k) == 2 and cfg.whole:
        store(accumulate(from_first_tile, cfg.state), outs["d_c_cross"].at[b, split, span])
    plgpu.wait_smem_to_gmem(0)


def _state_product(cfg, smem, slot):
    """<R, h> by row of the states."""

    def part(n, total):
        cut = (slot, slice(None), pl.ds(n * TILE, TILE))
        return total + jnp.sum(load_tile(smem["r"].at[cut]) * load_tile(smem["h"].at[cut]), axis=1)

    zero = plgpu.layout_cast(jnp.zeros(TILE, F32), ROW)
    return lax.fori_loop(0, cfg.state // TILE, part, zero)


def _db_warpgroup(cfg, k, idx, outs, smem, bars):
    b, span, group, split, head0 = idx

    def step(i, d_b):
        slot = lax.rem(i, cfg.stages)
        plgpu.barrier_wait(bars["full"].at[slot])

        def clear():
            _clear_padding(cfg, smem, *_head_tiles(cfg, k, smem, slot))
            plgpu.barrier_arrive(bars["clean"].at[slot])

        _when_padded(cfg, smem, clear)
        tok = _Tokens(smem, slot, k)
        weights = tok.to_end().astype(cfg.dtype)
        plgpu.wgmma(d_b, plgpu.load(smem["x"].at[slot], layout=WGMMA) * rows_of(weights), smem["r"].at[slot])
        if k == 1:
            product = _state_product(cfg, smem, slot) * (tok.through(0) * tok.through(1))
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(bars["empty"].at[slot])
        if k == 1:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            smem["db"][...] = product
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem["db"], outs["state"].at[b, span, head0 + i])

    def work(d_b):
        loop_with(d_b, cfg.block_heads, step)
        if cfg.pairs and cfg.whole:
            plgpu.barrier_wait(bars["ds_full"].at[0])
            for pair in range(2 - k):
                plgpu.wgmma(d_b, smem["m"].at[pair], smem["c1" if pair else "c"])
        return sums_of(d_b)

    outs["d_b"][b, split, span * 2 + k, :, group] = accumulate(work, cfg.state).astype(cfg.db_dtype)
    plgpu.wait_smem_to_gmem(0)


def _produce(cfg, k, idx, ins, smem, bars):
    b, span, _, _, head0 = idx
    own, columns = pl.ds((span * 2 + k) * TILE, TILE), pl.ds(cfg.column, cfg.state)

    def step(i, _):
        slot = lax.rem(i, cfg.stages)

        @pl.when(i >= cfg.stages)
        def _():
            plgpu.barrier_wait(bars["empty"].at[slot])

        bar, head = bars["full"].at[slot], head0 + i
        plgpu.copy_gmem_to_smem(ins["ab"].at[b, pl.ds(span * 2, 2), head], smem["ab"].at[slot], bar)
        plgpu.copy_gmem_to_smem(ins["x"].at[b, own, head], smem["x"].at[slot], bar)
        for tile in range(max(1, cfg.tiles(k))):
            rows = pl.ds((span * 2 + k + tile) * TILE, TILE)
            plgpu.copy_gmem_to_smem(ins["dy"].at[b, rows, head], smem["dy"].at[slot, tile], bar)
        plgpu.copy_gmem_to_smem(ins["r"].at[b, span, head, :, columns], smem["r"].at[slot], bar)
        plgpu.copy_gmem_to_smem(ins["h"].at[b, span, head, :, columns], smem["h"].at[slot], bar)
        if cfg.tiles(k) < 2:
            plgpu.barrier_arrive(bar)
        if cfg.has_d:
            plgpu.copy_gmem_to_smem(ins["d"].at[head], smem["d"].at[slot], bar)
        return None

    lax.fori_loop(0, cfg.block_heads, step, None)
    for i in range(min(cfg.stages, cfg.block_heads)):
        last = cfg.block_heads - min(cfg.stages, cfg.block_heads) + i
        plgpu.barrier_wait(bars["empty"].at[last % cfg.stages])


def _schedule(cfg, block):
    """(half, index of the span) of a thread block.

    The tiles of a span run side by side, so that they share the states through the cache; first tiles take longer, so
    those of the last round of blocks come before its second ones.
    """
    blocks = cfg.batch * cfg.groups * cfg.splits * cfg.chunks
    paired = (blocks - 1) // cfg.multiprocessors * cfg.multiprocessors // 2 * 2
    alone = (blocks - paired) // 2
    rest = jnp.maximum(block - paired, 0)
    side_by_side = block < paired
    half = jnp.where(side_by_side, lax.rem(block, 2), lax.div(rest, alone))
    return half, jnp.where(side_by_side, lax.div(block, 2), paired // 2 + lax.rem(rest, alone))


def _outputs(cfg):
    """Shapes of the kernel's outputs by name."""
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=F32)
    tokens, spans = (cfg.batch, cfg.chunks, cfg.heads), (cfg.batch, cfg.chunks // 2, cfg.heads)
    rest = (TILE, cfg.groups, cfg.state)
    named = {
        "source": f32((*tokens, 2 + cfg.has_d, TILE)),  # x . v, its part through the state, dy . x
        "target": f32((*tokens, TILE)),  # dy . y without the pairs of a second tile with the first
        "state": f32((*spans, TILE)),  # <R, h> by row of the states, decayed over the span
        "d_b": jax.ShapeDtypeStruct((cfg.batch, cfg.splits, cfg.chunks, *rest), cfg.db_dtype),
        "d_c": f32((cfg.batch, cfg.splits, cfg.chunks, *rest)),  # without the pairs of "cross"
    }
    if cfg.pairs:
        named["cross"] = f32((*spans, TILE))  # dy . y of the second tile by these pairs
    if cfg.pairs and cfg.whole:
        named["d_c_cross"] = f32((cfg.batch, cfg.splits, cfg.chunks // 2, *rest))
    elif cfg.pairs:
        shape = (cfg.batch, cfg.splits, cfg.chunks, cfg.groups, 2, TILE, TILE)
        named["d_s"] = jax.ShapeDtypeStruct(shape, cfg.dtype)  # [j, i], with the same tile and the second one
    return named


def _scratch(cfg):
    """Shared memory of a thread block by name."""
    tile = functools.partial(plgpu.SMEM, dtype=cfg.dtype, transforms=BF16_TRANSFORMS)
    s, n = cfg.stages, cfg.state
    return {
        "x": tile((s, TILE, TILE)),
        "dy": tile((s, 2, TILE, TILE)),
        "h": tile((s, TILE, n)),
        "r": tile((s, TILE, n)),
        "ab": plgpu.SMEM((s, 2, 2, TILE), F32),
        "d": plgpu.SMEM((s, TILE), F32) if cfg.has_d else None,
        "b": tile((TILE, n)),
        "c": tile((TILE, n)),
        "c1": tile((TILE, n)),
        "out": tile((TILE, TILE)),
        "m": tile((2, TILE, TILE)),
        "real": plgpu.SMEM((2, TILE), F32) if cfg.segments else None,
        "scores": tile((2, TILE, TILE)),
        "part": plgpu.SMEM((TILE, TILE), F32, transforms=F32_TRANSFORMS),
        "source": plgpu.SMEM((2 + cfg.has_d, TILE), F32),
        "target": plgpu.SMEM((2, TILE), F32),
        "db": plgpu.SMEM((TILE,), F32),
    }


def _barriers(cfg):
    return {
        "full": plgpu.Barrier(num_arrivals=6 + cfg.has_d, num_barriers=cfg.stages),
        "empty": plgpu.Barrier(num_arrivals=3, num_barriers=cfg.stages),
        "start": plgpu.Barrier(num_arrivals=3 + cfg.segments + cfg.given_scores, num_barriers=1),
        "clean": plgpu.Barrier(num_arrivals=1, num_barriers=cfg.stages),
        "m_full": plgpu.Barrier(num_arrivals=1, num_barriers=1),
        "m_empty": plgpu.Barrier(num_arrivals=1, num_barriers=1),
        "ds_full": plgpu.Barrier(num_arrivals=1, num_barriers=1),
    }


def _body(cfg, *refs):
    names = ["x", "dy", "ab", "b", "c", "h", "r"] + ["real"] * cfg.segments + ["d"] * cfg.has_d
    names += ["scores"] * cfg.given_scores
    ins, outs = dict(zip(names, refs)), dict(zip([*_outputs(cfg), "dx"], refs[len(names) :]))
    wg, block = lax.axis_index("wg"), lax.axis_index("block")
    half, tile_index = _schedule(cfg, block)
    rest, span = lax.div(tile_index, cfg.chunks // 2), lax.rem(tile_index, cfg.chunks // 2)
    b, rest = lax.div(rest, cfg.groups * cfg.splits), lax.rem(rest, cfg.groups * cfg.splits)
    idx = (b, span, lax.div(rest, cfg.splits), lax.rem(rest, cfg.splits), rest * cfg.block_heads)
    group = idx[2]

    def by_half(work):
        for k in range(2):

            @pl.when(half == k)
            def _():
                work(cfg, k)

    def scoped(smem, bars):
        def produce():
            bar = bars["start"].at[0]
            tiles = (("b", "b", half), ("c", "c", half), ("c1", "c", 1))
            for target, name, tile_half in tiles:
                rows = pl.ds((span * 2 + tile_half) * TILE, TILE)
                source = ins[name].at[b, rows, group, pl.ds(cfg.column, cfg.state)]
                plgpu.copy_gmem_to_smem(source, smem[target], bar)
            if cfg.given_scores:
                plgpu.copy_gmem_to_smem(ins["scores"].at[b, span * 2 + half, group], smem["scores"], bar)
            if cfg.segments:
                plgpu.copy_gmem_to_smem(ins["real"].at[b, pl.ds(span * 2, 2)], smem["real"], bar)
            by_half(lambda cfg, k: _produce(cfg, k, idx, ins, smem, bars))

        @pl.when(wg == 3)
        def _():
            plgpu.set_max_registers(REGISTERS[3], action="decrease")
            in_one_warp(produce)

        for number, work in enumerate((_source_warpgroup, _target_warpgroup, _db_warpgroup)):

            @pl.when(wg == number)
            def _():
                count = REGISTERS[number]
                plgpu.set_max_registers(count, action="increase" if count > 128 else "decrease")
                plgpu.barrier_wait(bars["start"].at[0])
                by_half(lambda cfg, k: work(cfg, k, idx, outs, smem, bars))

    pl.run_scoped(scoped, _scratch(cfg), _barriers(cfg), collective_axes="wg")


@functools.partial(jax.jit, static_argnums=0)  # so that calls alike are traced and lowered once
def _call(cfg, x, dy, ab, b_mat, c_mat, h, r, real, d, scores=None):
    out = _outputs(cfg) | {"dx": jax.ShapeDtypeStruct(x.shape, cfg.dtype)}
    kernel = plgpu.kernel(
        named_body("ssd_gradients", _body, cfg),
        out_type=list(out.values()),
        grid=(cfg.batch * cfg.groups * cfg.splits * cfg.chunks,),
        grid_names=("block",),
        num_threads=4,
        thread_name="wg",
        compiler_params=LANE_PARAMS,
    )
    args = [x, dy, ab, b_mat, c_mat, h, r, real if cfg.segments else None, d if cfg.has_d else None, scores]
    return dict(zip(out, call_varying(kernel, *(v for v in args if v is not None))))


def _by_tile(v, real, chunks):
    """[B, T, G, N] -> [B, chunks, 64, G, N], zeros behind T and on padding"""
    v = jnp.pad(v, ((0, 0), (0, chunks * TILE - v.shape[1]), (0, 0), (0, 0)))
    v = v.reshape(v.shape[0], chunks, TILE, *v.shape[2:])
    return v if real is None else jnp.where(real[..., None, None] > 0.0, v, 0)


def _score_tiles(cfg, b_mat, c_mat):
    """Scores [j, i] of each tile with itself (zero unless j <= i) and the next one: ``[B, chunks, G, 2, 64, 64]``."""
    c_mat = jnp.stack([c_mat, jnp.roll(c_mat, -1, axis=1)], axis=2)
    scores = jnp.einsum("bcjgn,bcpign->bcgpji", b_mat, c_mat, preferred_element_type=F32)
    token = jnp.arange(TILE)
    within = token[:, None] < (token[None] & -cfg.alone) if cfg.alone else token[:, None] <= token[None]
    return jnp.where(jnp.stack([within, jnp.ones_like(within)]), scores, 0.0).astype(cfg.dtype)


def add_to_first(total, part, axis: int):
    """total, to whose first entries along the axis part is added.

    No `.at[].add`: of entries that are all of them it makes a scatter without indices, an argument of no size, at
    which the compiler of a `shard_map` for GPUs ends (sdy.manual_computation, JAX 0.11.2).
    """
    first = lax.slice_in_dim(total, 0, part.shape[axis], axis=axis)
    return lax.dynamic_update_slice_in_dim(total, first + part, 0, axis=axis)


def _columns_in_parts(cfg, x, dy, ab, b_mat, c_mat, h, r, real, d):
    """``grads`` for more columns than shared memory holds: pairs with the first ones, the rest through the states."""
    width = cfg.state // 2
    first = dataclasses.replace(cfg, state=width, whole=False)
    second = dataclasses.replace(cfg, state=width, column=width, whole=False, pairs=False, has_d=False)
    b_tiles, c_tiles = _by_tile(b_mat, real, cfg.chunks), _by_tile(c_mat, real, cfg.chunks)
    one = _call(first, x, dy, ab, b_mat, c_mat, h, r, real, d, _score_tiles(cfg, b_tiles, c_tiles))
    two = _call(second, x, dy, ab, b_mat, c_mat, h, r, real, None)
    out = {name: one[name] + two[name] for name in ("target", "state", "dx")}
    out["source"] = add_to_first(one["source"], two["source"], axis=3)
    out["cross"] = one["cross"]
    d_s = one["d_s"].astype(F32).sum(1).astype(cfg.dtype)
    d_s, d_across = d_s[:, :, :, 0], d_s[:, ::2, :, 1]
    product = functools.partial(jnp.einsum, preferred_element_type=F32)
    d_b = product("bcgji,bcign->bcjgn", d_s, c_tiles)
    d_b = d_b.at[:, ::2].add(product("bcgji,bcign->bcjgn", d_across, c_tiles[:, 1::2]))
    d_c = product("bcgji,bcjgn->bcign", d_s, b_tiles)
    out["d_c_cross"] = product("bcgji,bcjgn->bcign", d_across, b_tiles[:, ::2])[:, None]
    for name, within in (("d_b", d_b), ("d_c", d_c)):
        out[name] = (jnp.concatenate([one[name], two[name]], axis=-1).sum(1) + within)[:, None]
    return out


def grads(cfg, x, dy, ab, b_mat, c_mat, h, r, real, d):
    """All gradients by name, see ``_outputs``; ``dx`` is ``[B, T, H, 64]``, d_b and d_c are parts of the heads.

    h and r ``[B, chunks / 2, H, 64, N]``: the state at the start of each span and the gradient of that at its end.
    """
    return (_call if cfg.state <= 2 * TILE else _columns_in_parts)(cfg, x, dy, ab, b_mat, c_mat, h, r, real, d)
