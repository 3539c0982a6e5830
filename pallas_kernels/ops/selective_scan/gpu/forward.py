# SPDX-License-Identifier: Apache-2.0
"""The forward walk over a row's tokens: a warpgroup a block of channels, its states in registers from end to end.

Tokens come in tiles of `TILE` by the copy engine, `STAGES` of them ahead. B and C are float32 and zero in padding.
No barrier is inserted automatically. The threads of a block share no more than what the copy engine brings, which its
barriers order: a tile is filled again once all have passed a commit. y goes to memory as it is: 32 bytes of a row a
warp and store, and loads of shared memory go ahead of it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import F32, PARAMS, named_body
from pallas_kernels.ops.selective_scan.gpu.threads import QUAD, STATES, Threads
from pallas_kernels.varying import call_varying

TILE = 32  # tokens
STAGES = 3
UNROLL = 8  # quads of tokens an iteration


@dataclasses.dataclass(frozen=True)
class Walk:
    """Sizes and options of a call. Tokens are whole tiles, channels of a group whole blocks."""

    batch: int
    tokens: int
    channels: int
    groups: int
    width: int  # channels of a thread
    dtype: jnp.dtype  # of x and y
    has_skip: bool = False
    segments: bool = False
    has_init: bool = False
    emit_final: bool = False
    keep_states: bool = False

    @property
    def threads(self) -> Threads:
        return Threads(self.width)

    @property
    def tiles(self) -> int:
        return self.tokens // TILE

    @property
    def blocks(self) -> int:
        return self.channels // self.threads.channels


def each_channel(row, cfg):
    """[channels] -> [channels, 16]."""
    return cfg.threads.spread(row)


def each_state(column, cfg):
    """[16] -> [channels, 16]."""
    return lax.broadcast_in_dim(column, (cfg.threads.channels, STATES), (1,))


def load_row(ref, cfg):
    return plgpu.load(ref, layout=cfg.threads.row, optimized=False)


def load_column(ref, cfg):
    return plgpu.load(ref, layout=cfg.threads.column, optimized=False)


def load_both(ref, cfg):
    return plgpu.load(ref, layout=cfg.threads.both, optimized=False)


def load_tokens(ref, cfg):
    return plgpu.load(ref, layout=cfg.threads.tokens, optimized=False)


def each_token(ref, cfg):
    """[channels] of memory -> [4, channels]."""
    row = plgpu.load(ref, layout=cfg.threads.tokens.reduce(0), optimized=False)
    return lax.broadcast_in_dim(row, (QUAD, cfg.threads.channels), (1,))


def is_real(tiles, rows, cfg):
    """Which of four tokens are no padding, [4, channels]."""
    marks = plgpu.load(tiles["marks"].at[rows], layout=cfg.threads.tokens.reduce(1), optimized=False)
    return lax.broadcast_in_dim(marks, (QUAD, cfg.threads.channels), (0,)) <= 0.0


def fetch(cfg, ins, smem, names, idx, tile, slot, bar):
    """Starts the copies of a tile."""
    b, block = idx
    rows = pl.ds(tile * TILE, TILE)
    channels = pl.ds(block * cfg.threads.channels, cfg.threads.channels)
    group = lax.div(block, cfg.blocks // cfg.groups)
    for name in names:
        source = ins[name].at[b, rows]
        if name in ("B", "C"):
            source = ins[name].at[b, rows, group]
        elif name != "marks":
            source = ins[name].at[b, rows, channels]
        plgpu.copy_gmem_to_smem(source, smem[name].at[slot], bar)


def step_inputs(cfg, tiles, t):
    """(x, dt, what to add to the log2 decays or None) of a token; padding has neither x nor dt."""
    x, dt = load_row(tiles["x"].at[t], cfg).astype(F32), load_row(tiles["dt"].at[t], cfg)
    if not cfg.segments:
        return x, dt, None
    mark = tiles["marks"][t]
    return if_real(mark, x), if_real(mark, dt), jnp.minimum(mark, 0.0)


def if_real(mark, array):
    """The array of a token, zero if it is padding."""
    return jnp.where(lax.broadcast_in_dim(mark, array.shape, ()) <= 0.0, array, 0.0)


def decays(cfg, rates, dt, between):
    """exp(dt A) of a token, [channels, 16]; `rates` is A log2(e)."""
    exponent = each_channel(dt, cfg) * rates
    return jnp.exp2(exponent if between is None else exponent + between)


def _ready(cfg, tiles, rates, t):
    """(decays, what is added to the states) of a token, each [channels, 16]: all of its step that asks for no state."""
    x, dt, between = step_inputs(cfg, tiles, t)
    b = each_state(load_column(tiles["B"].at[t], cfg), cfg)
    return decays(cfg, rates, dt, between), each_channel(dt * x, cfg) * b


def _quad(cfg, tiles, rates, skip, q, carry):
    """((states behind four tokens, what the next is ready with), y of the four [4, channels])."""
    (h, (decay, added)), products = carry, []
    for r in range(QUAD):
        t = q * QUAD + r
        h = decay * h + added
        decay, added = _ready(cfg, tiles, rates, t + 1 if r + 1 < QUAD else jnp.minimum(t + 1, TILE - 1))
        products.append(h * each_state(load_column(tiles["C"].at[t], cfg), cfg))
    y = cfg.threads.sum_states(*products)
    if cfg.has_skip:
        rows = pl.ds(q * QUAD, QUAD)
        x = load_tokens(tiles["x"].at[rows], cfg).astype(F32)
        y += skip * (jnp.where(is_real(tiles, rows, cfg), x, 0.0) if cfg.segments else x)
    return (h, (decay, added)), y


def _body(cfg, *refs):
    names = ["x", "dt", "B", "C"] + ["marks"] * cfg.segments
    others = ["A"] + ["D"] * cfg.has_skip + ["init"] * cfg.has_init
    ins, outs = dict(zip(names + others, refs)), dict(zip(outputs(cfg), refs[len(names + others) :]))
    idx = lax.axis_index("batch"), lax.axis_index("block")
    b, block = idx
    channels = pl.ds(block * cfg.threads.channels, cfg.threads.channels)

    def scoped(smem, bars):
        for n in range(min(STAGES, cfg.tiles)):
            fetch(cfg, ins, smem, names, idx, n, n, bars.at[n])
        rates = load_both(ins["A"].at[channels], cfg)
        skip = None
        if cfg.has_skip:
            skip = each_token(ins["D"].at[channels], cfg)
        if cfg.has_init:
            h = load_both(ins["init"].at[b, channels], cfg)
        else:
            h = plgpu.layout_cast(jnp.zeros((cfg.threads.channels, STATES), F32), cfg.threads.both)

        def step(n, h):
            slot = lax.rem(n, STAGES)
            if cfg.keep_states:
                outs["states"][b, n, channels] = h
            plgpu.barrier_wait(bars.at[slot])
            tiles = {name: smem[name].at[slot] for name in names}

            def quads(i, carry):
                ys = [None] * UNROLL
                for r in range(UNROLL):
                    carry, ys[r] = _quad(cfg, tiles, rates, skip, i * UNROLL + r, carry)
                for r in range(UNROLL):  # last, so that the sums of four tokens run beside the next four
                    rows = pl.ds(n * TILE + (i * UNROLL + r) * QUAD, QUAD)
                    outs["y"][b, rows, channels] = ys[r].astype(cfg.dtype)
                return carry

            h, _ = lax.fori_loop(0, TILE // QUAD // UNROLL, quads, (h, _ready(cfg, tiles, rates, 0)))
            plgpu.commit_smem()  # all have read the slot

            @pl.when(n + STAGES < cfg.tiles)
            def _():
                fetch(cfg, ins, smem, names, idx, n + STAGES, slot, bars.at[slot])

            return h

        h = lax.fori_loop(0, cfg.tiles, step, h)
        if cfg.emit_final:
            outs["final"][b, channels] = h

    pl.run_scoped(
        scoped,
        scratch(cfg, names, STAGES),
        plgpu.Barrier(num_arrivals=len(names), num_barriers=STAGES),
    )


def scratch(cfg, names, stages):
    """Shared memory of the tiles by name."""
    shapes = {
        "x": ((cfg.threads.channels,), cfg.dtype),
        "dy": ((cfg.threads.channels,), cfg.dtype),
        "dt": ((cfg.threads.channels,), F32),
        "B": ((STATES,), F32),
        "C": ((STATES,), F32),
        "marks": ((), F32),
    }
    return {name: plgpu.SMEM((stages, TILE, *shapes[name][0]), shapes[name][1]) for name in names}


def outputs(cfg):
    """Shapes of the results by name."""
    states = (cfg.channels, STATES)
    named = {"y": jax.ShapeDtypeStruct((cfg.batch, cfg.tokens, cfg.channels), cfg.dtype)}
    if cfg.emit_final:
        named["final"] = jax.ShapeDtypeStruct((cfg.batch, *states), F32)
    if cfg.keep_states:
        named["states"] = jax.ShapeDtypeStruct((cfg.batch, cfg.tiles, *states), F32)
    return named


@functools.partial(jax.jit, static_argnums=0)  # so that calls alike are traced and lowered once
def walk(cfg, x, dt, B, C, marks, rates, skip, init):
    """Results by name, see `outputs`: y, the final state ``[B, D, 16]``, the states that enter each tile."""
    out = outputs(cfg)
    kernel = plgpu.kernel(
        named_body("selective_scan_walk", _body, cfg),
        out_type=list(out.values()),
        grid=(cfg.batch, cfg.blocks),
        grid_names=("batch", "block"),
        compiler_params=PARAMS,
    )
    args = [x, dt, B, C, marks, rates, skip, init]
    return dict(zip(out, call_varying(kernel, *(a for a in args if a is not None))))
