# SPDX-License-Identifier: Apache-2.0
"""The forward walk over a row's tokens: a warpgroup a block of channels, its states in registers from end to end.

Tokens come in tiles of `TILE` by the copy engine. One more warpgroup of a thread block asks for them and makes them
ready: B and C, which are zero in padding, become float32. Two walk, or one where there are few channels.

Barriers of each slot: ``full`` between the copy engine and that warpgroup, ``ready`` between it and those that walk,
``empty`` back. None is inserted automatically: no thread reads what another one that walks has written.

A walk never waits for itself at a tile's end: its last step makes the next tile's first one ready, and the sums over
threads of its last tokens are taken in the next tile. So a tile is made ready while the second one before it is
walked (`LAG`). y goes to memory as it is, 32 bytes of a row a warp and store: loads of shared memory go ahead of it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import F32, LOG2E, PARAMS, named_body
from pallas_kernels.ops.selective_scan.gpu.exponentials import exp2
from pallas_kernels.ops.selective_scan.gpu.threads import QUAD, STATES, Threads
from pallas_kernels.varying import call_varying

TILE = 32  # tokens
STAGES = 4  # tiles in shared memory
LAG = 2  # tiles that are ready before one is refilled
# Of bfloat16 with dt in float32, which of the eight exponentials of a thread (two channels of four states) are by a
# polynomial, of tokens in turn. With dt in bfloat16, which takes more instructions, it costs more than it saves.
BY_POLYNOMIAL = ((0,), (), (), ())


@dataclasses.dataclass(frozen=True)
class Walk:
    """Sizes and options of a call. Tokens are whole tiles, channels of a group whole blocks."""

    batch: int
    tokens: int
    channels: int
    groups: int
    width: int  # channels of a thread
    dtype: jnp.dtype  # of x and y
    maps: jnp.dtype  # of B and C
    steps: jnp.dtype  # of dt
    walkers: int = 1  # warpgroups that walk in a thread block
    has_skip: bool = False
    segments: bool = False
    has_init: bool = False
    emit_final: bool = False
    keep_states: bool = False

    @property
    def threads(self) -> Threads:
        return Threads(self.width)

    @property
    def by_polynomial(self) -> tuple:
        """Exponentials that are, see BY_POLYNOMIAL."""
        worth = (self.dtype, self.steps, self.width) == (jnp.bfloat16, F32, 2)
        return BY_POLYNOMIAL if worth else ((),)

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
    x, dt = (cfg.threads.widen(load_row(tiles[name].at[t], cfg), cfg.threads.row) for name in ("x", "dt"))
    if not cfg.segments:
        return x, dt, None
    mark = tiles["marks"][t]
    return if_real(mark, x), if_real(mark, dt), jnp.minimum(mark, 0.0)


def if_real(mark, array):
    """The array of a token, zero if it is padding."""
    return jnp.where(lax.broadcast_in_dim(mark, array.shape, ()) <= 0.0, array, 0.0)


def log_decays(cfg, rates, dt, between):
    """dt A log2(e) of a token, [channels, 16]; `rates` is A log2(e)."""
    exponents = each_channel(dt, cfg) * rates
    return exponents if between is None else exponents + between


def _ready(cfg, tiles, rates, t, turn=0):
    """(decays, what is added to the states) of a token, each [channels, 16]: all of its step that asks for no state."""
    x, dt, between = step_inputs(cfg, tiles, t)
    exponents, chosen = log_decays(cfg, rates, dt, between), cfg.by_polynomial[turn % len(cfg.by_polynomial)]
    decays = exp2(cfg.threads, exponents, chosen) if chosen else jnp.exp2(exponents)
    b = each_state(load_column(tiles["B"].at[t], cfg), cfg)
    return decays, each_channel(dt * x, cfg) * b


def _quad(cfg, tiles, behind, rates, q, carry):
    """((states behind four tokens, what the next token is ready with), what `_outputs` makes y of). Behind a tile's
    last token comes the first one of the tile `behind`."""
    (h, (decay, added)), sums, rows = carry, [], pl.ds(q * QUAD, QUAD)
    for r, t in enumerate(range(q * QUAD, (q + 1) * QUAD)):
        h = decay * h + added
        decay, added = _ready(cfg, tiles if t + 1 < TILE else behind, rates, (t + 1) % TILE, r + 1)
        sums.append(cfg.threads.sum_own(h * each_state(load_column(tiles["C"].at[t], cfg), cfg)))
    x = None
    if cfg.has_skip:
        x = load_tokens(tiles["x"].at[rows], cfg)
        x = jnp.where(is_real(tiles, rows, cfg), x, jnp.zeros_like(x)) if cfg.segments else x
    return (h, (decay, added)), (sums, x)


def _outputs(cfg, skip, sums, x):
    """y of four tokens, [4, channels]."""
    y = cfg.threads.sum_states(*sums)
    return (y if skip is None else y + skip * cfg.threads.widen(x, cfg.threads.tokens)).astype(cfg.dtype)


def _produce(cfg, ins, smem, bars, names, idx):
    """Work of the warpgroup that asks for tiles and makes them ready."""
    b, pair = idx
    layout = plgpu.Layout.WG_STRIDED((TILE, STATES), vec_size=4)

    def fetch_all(tile, slot):
        shared = [name for name in names if name not in ("x", "dt")]
        fetch(cfg, ins, smem, shared, (b, pair * cfg.walkers), tile, slot, bars["full"].at[slot])
        for walker in range(cfg.walkers):
            own = {name: smem[name].at[walker] for name in ("x", "dt")}
            fetch(cfg, ins, own, own, (b, pair * cfg.walkers + walker), tile, slot, bars["full"].at[slot])

    def refill(n, slot):
        plgpu.barrier_wait(bars["empty"].at[slot])

        @pl.when(n + STAGES < cfg.tiles)
        def _():
            fetch_all(n + STAGES, slot)

    for n in range(min(STAGES, cfg.tiles)):
        fetch_all(n, n)

    def step(n, _):
        slot = lax.rem(n, STAGES)
        plgpu.barrier_wait(bars["full"].at[slot])
        for name in ("B", "C"):
            smem[name + "32"].at[slot][...] = plgpu.load(smem[name].at[slot], layout=layout).astype(F32)
        plgpu.barrier_arrive(bars["ready"].at[slot])

        @pl.when(n >= LAG)
        def _():
            refill(n - LAG, lax.rem(n + STAGES - LAG, STAGES))

    lax.fori_loop(0, cfg.tiles, step, None)
    for n in range(max(cfg.tiles - LAG, 0), cfg.tiles):
        plgpu.barrier_wait(bars["empty"].at[n % STAGES])


def _walk(cfg, ins, outs, smem, bars, names, idx, walker):
    """Work of a warpgroup that walks."""
    b, block = idx
    channels = pl.ds(block * cfg.threads.channels, cfg.threads.channels)
    rates = load_both(ins["A"].at[channels], cfg) * LOG2E
    skip = each_token(ins["D"].at[channels], cfg) if cfg.has_skip else None
    if cfg.has_init:
        h = load_both(ins["init"].at[b, channels], cfg)
    else:
        h = plgpu.layout_cast(jnp.zeros((cfg.threads.channels, STATES), F32), cfg.threads.both)

    def tiles_at(slot):
        tiles = {name: smem[name].at[walker, slot] for name in ("x", "dt")}
        tiles |= {name: smem[name + "32"].at[slot] for name in ("B", "C")}
        return tiles | ({"marks": smem["marks"].at[slot]} if cfg.segments else {})

    def store(first, due):
        cfg.threads.store(outs["y"].at[b, pl.ds(first, QUAD), channels], _outputs(cfg, skip, *due))

    def step(n, carry):
        (h, ready), due = carry
        slot, following = lax.rem(n, STAGES), lax.rem(n + 1, STAGES)
        if cfg.keep_states:
            outs["states"][b, n, channels] = h

        @pl.when(n + 1 < cfg.tiles)
        def _():
            plgpu.barrier_wait(bars["ready"].at[following])

        carry = h, ready
        for q in range(TILE // QUAD):
            store(jnp.maximum(n * TILE + (q - 1) * QUAD, 0), due)  # the row's first ones are stored again, by y
            carry, due = _quad(cfg, tiles_at(slot), tiles_at(following), rates, q, carry)
        plgpu.barrier_arrive(bars["empty"].at[slot])
        return carry, due

    plgpu.barrier_wait(bars["ready"].at[0])
    zeros = lambda shape, dtype, layout: plgpu.layout_cast(jnp.zeros(shape, dtype), layout)
    nothing = zeros((cfg.threads.channels, QUAD), F32, cfg.threads.shares)
    x = zeros((QUAD, cfg.threads.channels), cfg.dtype, cfg.threads.tokens) if cfg.has_skip else None
    first = _ready(cfg, tiles_at(0), rates, 0)
    (h, _), due = lax.fori_loop(0, cfg.tiles, step, ((h, first), ([nothing] * QUAD, x)))
    store(cfg.tokens - QUAD, due)
    if cfg.emit_final:
        outs["final"][b, channels] = h


def _body(cfg, *refs):
    names = ["x", "dt", "B", "C"] + ["marks"] * cfg.segments
    others = ["A"] + ["D"] * cfg.has_skip + ["init"] * cfg.has_init
    ins, outs = dict(zip(names + others, refs)), dict(zip(outputs(cfg), refs[len(names + others) :]))
    wg, b, pair = (lax.axis_index(axis) for axis in ("wg", "batch", "pair"))

    def scoped(smem, bars):
        @pl.when(wg < cfg.walkers)
        def _():
            _walk(cfg, ins, outs, smem, bars, names, (b, pair * cfg.walkers + wg), wg)

        @pl.when(wg == cfg.walkers)
        def _():
            _produce(cfg, ins, smem, bars, names, (b, pair))

    of = scratch(cfg, names, STAGES)
    of |= {name + "32": plgpu.SMEM((STAGES, TILE, STATES), F32) for name in ("B", "C")}
    for name in ("x", "dt"):
        of[name] = plgpu.SMEM((cfg.walkers, *of[name].shape), of[name].dtype)
    counts = {"full": len(names) + 2 * (cfg.walkers - 1), "ready": 1, "empty": cfg.walkers}
    bars = {name: plgpu.Barrier(num_arrivals=count, num_barriers=STAGES) for name, count in counts.items()}
    pl.run_scoped(scoped, of, bars, collective_axes="wg")


def scratch(cfg, names, stages):
    """Shared memory of the tiles by name."""
    shapes = {
        "x": ((cfg.threads.channels,), cfg.dtype),
        "dy": ((cfg.threads.channels,), cfg.dtype),
        "dt": ((cfg.threads.channels,), cfg.steps),
        "B": ((STATES,), cfg.maps),
        "C": ((STATES,), cfg.maps),
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
def walk(cfg, x, dt, B, C, marks, A, skip, init):
    """Results by name, see `outputs`: y, the final state ``[B, D, 16]``, the states that enter each tile."""
    out = outputs(cfg)
    kernel = plgpu.kernel(
        named_body("selective_scan_walk", _body, cfg),
        out_type=list(out.values()),
        grid=(cfg.batch, cfg.blocks // cfg.walkers),
        grid_names=("batch", "pair"),
        num_threads=cfg.walkers + 1,
        thread_name="wg",
        compiler_params=PARAMS,
    )
    args = [x, dt, B, C, marks, A, skip, init]
    return dict(zip(out, call_varying(kernel, *(a for a in args if a is not None))))
