# SPDX-License-Identifier: Apache-2.0
"""The backward walk: tiles of tokens last to first, each from the state that the forward kept of its first token.

Within a tile the states are computed twice: once through it, of which those that enter each four tokens stay in shared
memory, and then four tokens at a time, last first, whose states and decays stay in registers for the gradients.

dB and dC are sums over channels: each warp's go through shared memory, each block's to an array of their own that XLA
adds up, in one order. Shared memory is ordered as in the forward walk; the states in it a thread keeps for itself.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import F32, LOG2E, PARAMS, named_body
from pallas_kernels.ops.selective_scan.gpu.forward import (
    TILE,
    decays,
    each_channel,
    each_state,
    each_token,
    fetch,
    if_real,
    is_real,
    load_both,
    load_column,
    load_row,
    load_tokens,
    scratch,
    step_inputs,
)
from pallas_kernels.ops.selective_scan.gpu.threads import LANES, QUAD, STATES, WARPS, places
from pallas_kernels.varying import call_varying

STAGES = 2
QUADS = TILE // QUAD


def _advance(cfg, tiles, rates, t, h):
    """(state behind a token, its decays, x, dt)."""
    x, dt, between = step_inputs(cfg, tiles, t)
    b = each_state(load_column(tiles["B"].at[t], cfg), cfg)
    decay = decays(cfg, rates, dt, between)
    return decay * h + each_channel(dt * x, cfg) * b, decay, x, dt


def _entering(cfg, tiles, smem, rates, h):
    """Leaves the states that enter each four tokens in shared memory."""

    def step(q, h):
        smem["states"][q] = h
        for r in range(QUAD):
            h, *_ = _advance(cfg, tiles, rates, q * QUAD + r, h)
        return h

    smem["states"][QUADS - 1] = lax.fori_loop(0, QUADS - 1, step, h)


def _token(cfg, tiles, smem, t, token, carry):
    """(gradient of the state before the token, of A so far), and the terms of those of x and dt."""
    g, dA = carry
    before, h, decay, x, dt, rates = token
    dy = load_row(tiles["dy"].at[t], cfg).astype(F32)
    if cfg.segments:
        dy = if_real(tiles["marks"][t], dy)
    dy = each_channel(dy, cfg)
    b, c = (each_state(load_column(tiles[name].at[t], cfg), cfg) for name in ("B", "C"))
    g = dy * c + g
    smem["sums"][:, t] = cfg.threads.sum_channels(g * each_channel(dt * x, cfg), dy * h)
    inputs = g * b
    g = g * decay
    log_decay = g * before
    return (g, dA + log_decay * each_channel(dt, cfg)), inputs, log_decay * rates


def _quad(cfg, tiles, smem, rates, skip, q, carry):
    """The gradients of four tokens."""
    g, dA, dskip = carry
    h, tokens = load_both(smem["states"].at[q], cfg), []
    for r in range(QUAD):
        before = h
        h, decay, x, dt = _advance(cfg, tiles, rates, q * QUAD + r, before)
        tokens.append((before, h, decay, x, dt, rates))
    inputs, exponents = [None] * QUAD, [None] * QUAD
    for r in reversed(range(QUAD)):
        (g, dA), inputs[r], exponents[r] = _token(cfg, tiles, smem, q * QUAD + r, tokens[r], (g, dA))

    rows = pl.ds(q * QUAD, QUAD)
    x, dt, dy = (load_tokens(tiles[name].at[rows], cfg).astype(F32) for name in ("x", "dt", "dy"))
    inputs, exponents = cfg.threads.sum_states(*inputs), cfg.threads.sum_states(*exponents) * math.log(2)
    if cfg.segments:
        real = is_real(tiles, rows, cfg)
        x, dt, dy, exponents = (jnp.where(real, array, 0.0) for array in (x, dt, dy, exponents))
    dx = dt * inputs
    if cfg.has_skip:
        dx, dskip = dx + skip * dy, dskip + x * dy
    smem["dx"][rows] = dx.astype(cfg.dtype)
    smem["ddt"][rows] = x * inputs + exponents
    return g, dA, dskip


def _store(cfg, idx, smem, outs, n):
    """Starts the copies of a tile's gradients, whose shared memory all threads have written."""
    b, block = idx
    rows, channels = pl.ds(n * TILE, TILE), pl.ds(block * cfg.threads.channels, cfg.threads.channels)
    layout = plgpu.Layout.WG_STRIDED((TILE, LANES), vec_size=4)
    smem["maps"][...] = sum(plgpu.load(smem["sums"].at[warp], layout=layout) for warp in range(WARPS))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem["dx"], outs["dx"].at[b, rows, channels])
    plgpu.copy_smem_to_gmem(smem["ddt"], outs["ddt"].at[b, rows, channels])
    plgpu.copy_smem_to_gmem(smem["maps"], outs["maps"].at[b, block, rows])


def _body(cfg, with_final, *refs):
    names = ["x", "dt", "B", "C", "dy"] + ["marks"] * cfg.segments
    others = ["states", "A"] + ["D"] * cfg.has_skip + ["dfinal"] * with_final
    ins, outs = dict(zip(names + others, refs)), dict(zip(_outputs(cfg), refs[len(names + others) :]))
    idx = lax.axis_index("batch"), lax.axis_index("block")
    b, block = idx
    channels = pl.ds(block * cfg.threads.channels, cfg.threads.channels)
    last = cfg.tiles - 1

    def scoped(smem, bars):
        for n in range(min(STAGES, cfg.tiles)):
            fetch(cfg, ins, smem, names, idx, last - n, n, bars.at[n])
        rates = load_both(ins["A"].at[channels], cfg)
        skip = each_token(ins["D"].at[channels], cfg) if cfg.has_skip else None
        zeros = plgpu.layout_cast(jnp.zeros((cfg.threads.channels, STATES), F32), cfg.threads.both)
        g = load_both(ins["dfinal"].at[b, channels], cfg) if with_final else zeros
        dskip = plgpu.layout_cast(jnp.zeros((QUAD, cfg.threads.channels), F32), cfg.threads.tokens)

        def step(i, carry):
            n, slot = last - i, lax.rem(i, STAGES)
            h = load_both(ins["states"].at[b, n, channels], cfg)
            plgpu.barrier_wait(bars.at[slot])
            tiles = {name: smem[name].at[slot] for name in names}
            _entering(cfg, tiles, smem, rates, h)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile behind has left
            plgpu.commit_smem()
            quad = functools.partial(_quad, cfg, tiles, smem, rates, skip)
            carry = lax.fori_loop(0, QUADS, lambda j, carry: quad(QUADS - 1 - j, carry), carry)
            plgpu.commit_smem()

            @pl.when(i + STAGES < cfg.tiles)
            def _():
                fetch(cfg, ins, smem, names, idx, n - STAGES, slot, bars.at[slot])

            _store(cfg, idx, smem, outs, n)
            return carry

        g, dA, dskip = lax.fori_loop(0, cfg.tiles, step, (g, zeros, dskip))
        outs["dA"][b, channels] = dA
        if cfg.has_skip:
            outs["dD"][b, :, channels] = dskip
        if cfg.has_init:
            outs["dinit"][b, channels] = g
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        scoped,
        scratch(cfg, names, STAGES)
        | {
            "states": plgpu.SMEM((QUADS, cfg.threads.channels, STATES), F32),
            "dx": plgpu.SMEM((TILE, cfg.threads.channels), cfg.dtype),
            "ddt": plgpu.SMEM((TILE, cfg.threads.channels), F32),
            "sums": plgpu.SMEM((WARPS, TILE, LANES), F32),
            "maps": plgpu.SMEM((TILE, LANES), F32),
        },
        plgpu.Barrier(num_arrivals=len(names), num_barriers=STAGES),
    )


def _outputs(cfg):
    """Shapes of the results by name."""
    tokens, states = (cfg.batch, cfg.tokens, cfg.channels), (cfg.batch, cfg.channels, STATES)
    named = {
        "dx": jax.ShapeDtypeStruct(tokens, cfg.dtype),
        "ddt": jax.ShapeDtypeStruct(tokens, F32),
        "maps": jax.ShapeDtypeStruct((cfg.batch, cfg.blocks, cfg.tokens, LANES), F32),
        "dA": jax.ShapeDtypeStruct(states, F32),
    }
    if cfg.has_skip:
        named["dD"] = jax.ShapeDtypeStruct((cfg.batch, QUAD, cfg.channels), F32)
    if cfg.has_init:
        named["dinit"] = jax.ShapeDtypeStruct(states, F32)
    return named


@functools.partial(jax.jit, static_argnums=0)  # so that calls alike are traced and lowered once
def gradients(cfg, x, dt, A, B, C, skip, marks, states, dy, dfinal):
    """Gradients of x, dt, A, B, C, D and the initial state (of the latter two None where there is none).

    states ``[B, tiles, D, 16]`` are those that the forward walk kept; dfinal ``[B, D, 16]`` or None.
    """
    out = _outputs(cfg)
    kernel = plgpu.kernel(
        named_body("selective_scan_gradients", _body, cfg, dfinal is not None),
        out_type=list(out.values()),
        grid=(cfg.batch, cfg.blocks),
        grid_names=("batch", "block"),
        compiler_params=PARAMS,
    )
    args = [x, dt, B, C, dy, marks, states, A * LOG2E, skip, dfinal]
    found = dict(zip(out, call_varying(kernel, *(a for a in args if a is not None))))
    maps = found["maps"].reshape(cfg.batch, cfg.groups, -1, cfg.tokens, LANES).sum(2).swapaxes(1, 2)
    dB, dC = (maps[..., place] for place in places())
    dskip = found["dD"].sum((0, 1)) if cfg.has_skip else None
    return found["dx"], found["ddt"], found["dA"].sum(0), dB, dC, dskip, found.get("dinit")
