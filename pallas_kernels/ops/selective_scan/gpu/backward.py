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
    log_decays,
    scratch,
    step_inputs,
)
from pallas_kernels.ops.selective_scan.gpu.threads import LANES, QUAD, STATES, WARPS, places
from pallas_kernels.varying import call_varying

STAGES = 2
UNROLL = 2  # quads of tokens an iteration
QUADS = TILE // QUAD


def _load(cfg, tiles, t, names):
    """What the threads hold of a token, by name: x, dt and dy are rows, B and C columns."""
    x, dt, between = step_inputs(cfg, tiles, t)
    held = {"x": x, "dt": dt, "between": between}
    held |= {name: each_state(load_column(tiles[name].at[t], cfg), cfg) for name in names if name in "BC"}
    if "dy" in names:
        dy = load_row(tiles["dy"].at[t], cfg).astype(F32)
        held["dy"] = each_channel(if_real(tiles["marks"][t], dy) if cfg.segments else dy, cfg)
    return held


def _advance(cfg, rates, token, h):
    """(state behind a token, its decays, what it adds to a state but B)."""
    decay = jnp.exp2(log_decays(cfg, rates, token["dt"], token["between"]))
    inputs = each_channel(token["dt"] * token["x"], cfg)
    return decay * h + inputs * token["B"], decay, inputs


def _entering(cfg, tiles, smem, rates, h):
    """Leaves the states that enter each four tokens in shared memory."""

    def step(q, h):
        tokens = [_load(cfg, tiles, q * QUAD + r, ("B",)) for r in range(QUAD)]
        smem["states"][q] = h
        for token in tokens:
            h, *_ = _advance(cfg, rates, token, h)
        return h

    smem["states"][QUADS - 1] = lax.fori_loop(0, QUADS - 1, step, h)


def _gradients(cfg, rates, token, states, decay, inputs, carry):
    """((gradients of the state before a token, of A so far), its sums over channels, and terms of those over states:
    of what the token adds to a state, and of its log2 decay)."""
    (g, dA), (before, behind) = carry, states
    g = token["dy"] * token["C"] + g
    sums = cfg.threads.sum_channels(g * inputs, token["dy"] * behind)
    of_inputs, g = g * token["B"], g * decay
    of_decay = g * before
    return (g, dA + of_decay * each_channel(token["dt"], cfg)), sums, of_inputs, of_decay * rates


def _quad(cfg, tiles, smem, rates, skip, q, carry):
    """(carry, the gradients of four tokens by name). All that they load comes first."""
    g, dA, dskip = carry
    rows = pl.ds(q * QUAD, QUAD)
    states, steps = [load_both(smem["states"].at[q], cfg)], []
    tokens = [_load(cfg, tiles, q * QUAD + r, ("B", "C", "dy")) for r in range(QUAD)]
    x, dt, dy = (load_tokens(tiles[name].at[rows], cfg).astype(F32) for name in ("x", "dt", "dy"))
    for token in tokens:
        h, *step = _advance(cfg, rates, token, states[-1])
        states.append(h)
        steps.append(step)
    sums, of_inputs, of_decays = ([None] * QUAD for _ in range(3))
    for r in reversed(range(QUAD)):
        found = _gradients(cfg, rates, tokens[r], states[r : r + 2], *steps[r], (g, dA))
        (g, dA), sums[r], of_inputs[r], of_decays[r] = found
    summed = lambda arrays: cfg.threads.sum_states(*map(cfg.threads.sum_own, arrays))
    of_inputs, of_decays = summed(of_inputs), summed(of_decays) * math.log(2)
    if cfg.segments:
        real = is_real(tiles, rows, cfg)
        x, dt, dy, of_decays = (jnp.where(real, array, 0.0) for array in (x, dt, dy, of_decays))
    dx = dt * of_inputs
    if cfg.has_skip:
        dx, dskip = dx + skip * dy, dskip + x * dy
    return (g, dA, dskip), dx.astype(cfg.dtype), (x * of_inputs + of_decays).astype(cfg.steps), sums


def _quads(cfg, idx, tiles, smem, outs, rates, skip, n, i, carry):
    """The gradients of some tokens of tile n; sums last: what is loaded behind them is not loaded ahead."""
    (b, block), found = idx, []
    channels = pl.ds(block * cfg.threads.channels, cfg.threads.channels)
    for q in (QUADS - 1 - i * UNROLL - r for r in range(UNROLL)):
        carry, dx, ddt, sums = _quad(cfg, tiles, smem, rates, skip, q, carry)
        rows = pl.ds(n * TILE + q * QUAD, QUAD)
        outs["dx"][b, rows, channels], outs["ddt"][b, rows, channels] = dx, ddt
        found += [(q * QUAD + r, sums[r]) for r in range(QUAD)]
    for t, sums in found:
        smem["sums"][:, t] = sums
    return carry


def _store_maps(idx, smem, outs, n):
    """Adds up the warps' sums of a tile, which all have stored, and starts their copy."""
    layout = plgpu.Layout.WG_STRIDED((TILE, LANES), vec_size=4)
    smem["maps"][...] = sum(plgpu.load(smem["sums"].at[warp], layout=layout) for warp in range(WARPS))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem["maps"], outs["maps"].at[*idx, pl.ds(n * TILE, TILE)])


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
            quads = functools.partial(_quads, cfg, idx, tiles, smem, outs, rates, skip, n)
            carry = lax.fori_loop(0, QUADS // UNROLL, quads, carry)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the sums of the tile behind have left
            plgpu.commit_smem()

            @pl.when(i + STAGES < cfg.tiles)
            def _():
                fetch(cfg, ins, smem, names, idx, n - STAGES, slot, bars.at[slot])

            _store_maps(idx, smem, outs, n)
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
        "ddt": jax.ShapeDtypeStruct(tokens, cfg.steps),
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
