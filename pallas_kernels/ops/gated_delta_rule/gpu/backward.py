# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernels of the backward of the gated delta rule: a walk in reverse, then all else in parallel.

In the words of `forward`, with ``R`` the gradient of the state that leaves a chunk, the walk finds

    dV = T^T diag(beta) (A^T dy + diag(exp2(a_end - a)) k R)      the gradient of v, and of v - what was read
    R of the chunk before = exp2(a_end) R + sum_i exp2(a_i) (scale q_i dy_i^T - k_i dV_i^T)

with R transposed in registers as the forward has the state. With the state S that enters a chunk and the R that leaves
it, its other gradients are, for ``F_ij = beta_j (dy_i . U_j) E_ij`` and ``H_ij = -beta_j (dV_i . U_j) E_ij``,

    dq_i = exp2(a_i) S dy_i + sum_j F_ij k_j
    dk_i = [sum_j H_ij k_j - exp2(a_i) S dV_i] + [beta_i exp2(a_end - a_i) R U_i + sum_j F_ji q_j + H_ji k_j]

and so on for the lengths. What acts from token i back on others (dq, the first bracket) grows with a_i, what acts from
i on those behind it shrinks with it: the gradient of a_i is q_i . dq_i + k_i . (first) - k_i . (second), and that of
beta_i is k_i . (second) / beta_i. A pair stands in two of these products with the same rounded F or H, so what does not
cross a token cancels to float32 accuracy. A beta below 2^-64 counts as 2^-64, so that the quotient holds for 0.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platform
from pallas_kernels.mosaic_gpu import (
    BF16_TRANSFORMS,
    COL,
    F32,
    ROW,
    TILE,
    WGMMA,
    accumulate,
    cols_of,
    drain,
    in_one_warp,
    load_tile,
    named_body,
    rows_of,
    sums_of,
    zeros,
)
from pallas_kernels.ops.gated_delta_rule.gpu import threads
from pallas_kernels.ops.gated_delta_rule.gpu.forward import (
    BETA,
    DECAY,
    FROM_STATE_K,
    FROM_STATE_Q,
    LANE_PARAMS,
    NUMBERS,
    PER_K,
    PER_Q,
    TO_STATE,
    Walk,
    clear_padding,
    terms_of,
    vector,
)
from pallas_kernels.varying import call_varying

STAGES = 2
SMALLEST_BETA = 2.0**-64


@dataclasses.dataclass(frozen=True)
class Reverse:
    """Static description of the walk in reverse."""

    walk: Walk
    has_final: bool  # a gradient of the final state
    emit_init: bool


def _reverse_step(cfg, grad, idx, outs, smem, bars, step, part):
    """One chunk of 64 value channels: returns the gradient of the state that enters it."""
    b, head = idx
    slot, chunk = lax.rem(step, STAGES), cfg.walk.chunks - 1 - step
    q, k, dy = smem["q"].at[slot], smem["k"].at[slot], smem["dy"].at[slot, part]
    out = smem["out"].at[part + threads.hidden_zero()]
    numbers, dtype = smem["numbers"].at[slot], cfg.walk.dtype
    rows, channels = pl.ds(chunk * TILE, TILE), pl.ds(part * TILE, TILE)
    columns = [pl.ds(n, TILE) for n in range(0, cfg.walk.key, TILE)]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a barrier of the warpgroup, too
    for n in range(len(columns)):
        out[n] = grad[:, n * TILE : (n + 1) * TILE].astype(dtype)
    plgpu.commit_smem()
    for n, cut in enumerate(columns):
        plgpu.copy_smem_to_gmem(out.at[n], outs["grads"].at[b, chunk, head, channels, cut])
    plgpu.barrier_wait(bars["full"].at[slot])
    clear_padding(cfg.walk, smem, slot, q, k, dy)

    def written(acc):
        for n, cut in enumerate(columns):
            plgpu.wgmma(acc, out.at[n], k.at[:, cut].T)
        given = plgpu.load(dy.T, layout=WGMMA)
        acc[...] = sums_of(acc) * cols_of(vector(numbers.at[TO_STATE]))
        plgpu.wgmma(acc, given, smem["a"].at[slot])
        asked = (given.astype(F32) * cols_of(vector(numbers.at[FROM_STATE_Q]))).astype(dtype)
        return terms_of(cfg.walk, sums_of(acc) * cols_of(vector(numbers.at[BETA]))), asked

    weighted, asked = accumulate(written, TILE)

    def solved(acc):
        if cfg.walk.exact:
            plgpu.wgmma(acc, weighted[0], smem["t_rest"].at[slot])
        for term in weighted[::-1]:
            plgpu.wgmma(acc, term, smem["t"].at[slot])
        return sums_of(acc)

    d_v = accumulate(solved, TILE)
    read = terms_of(cfg.walk, -d_v * cols_of(vector(numbers.at[FROM_STATE_K])))
    decay = jnp.exp2(numbers[DECAY, TILE - 1])

    def onward(acc):
        acc[...] = grad * decay
        plgpu.wgmma(acc, asked, q)
        for term in read[::-1]:
            plgpu.wgmma(acc, term, k)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out.at[0].T[...] = d_v.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out.at[0], outs["dv"].at[b, rows, head, channels])
        return acc[...]

    grad = accumulate(onward, cfg.walk.key)
    plgpu.barrier_arrive(bars["empty"].at[slot])
    return grad


def _reverse_states(cfg, idx, ins, outs, smem, bars, part):
    b, head = idx
    channels = pl.ds(part * TILE, TILE)
    grad = zeros(cfg.walk.key)
    if cfg.has_final:
        grad = plgpu.load(ins["final"].at[b, head, channels], layout=WGMMA, optimized=False)

    def step(i, grad):
        return _reverse_step(cfg, grad, idx, outs, smem, bars, i, part)

    grad = lax.fori_loop(0, cfg.walk.chunks, step, grad)
    if cfg.emit_init:
        outs["init"][b, head, channels] = grad
    plgpu.wait_smem_to_gmem(0)


def _reverse_produce(cfg, idx, ins, smem, bars):
    b, head = idx
    group = lax.div(head, cfg.walk.heads // cfg.walk.groups)

    def step(i, _):
        slot, chunk = lax.rem(i, STAGES), cfg.walk.chunks - 1 - i
        rows, bar = pl.ds(chunk * TILE, TILE), bars["full"].at[slot]

        @pl.when(i >= STAGES)
        def _():
            plgpu.barrier_wait(bars["empty"].at[slot])

        for name in ("k", "q"):
            plgpu.copy_gmem_to_smem(ins[name].at[b, rows, group], smem[name].at[slot], bar)
        for part in range(cfg.walk.parts):
            source = ins["dy"].at[b, rows, head, pl.ds(part * TILE, TILE)]
            plgpu.copy_gmem_to_smem(source, smem["dy"].at[slot, part], bar)
        for name in ["a", "t", "numbers"] + ["t_rest"] * cfg.walk.exact:
            plgpu.copy_gmem_to_smem(ins[name].at[b, chunk, head], smem[name].at[slot], bar)
        if cfg.walk.segments:
            plgpu.copy_gmem_to_smem(ins["real"].at[b, chunk], smem["real"].at[slot], bar)
        return None

    lax.fori_loop(0, cfg.walk.chunks, step, None)
    drain(cfg.walk.chunks, STAGES, [bars["empty"]])


def _reverse_outputs(cfg):
    walk = cfg.walk
    states = (walk.batch, walk.chunks, walk.heads, walk.width, walk.key)
    named = {
        "dv": jax.ShapeDtypeStruct((walk.batch, walk.tokens, walk.heads, walk.width), walk.dtype),
        "grads": jax.ShapeDtypeStruct(states, walk.dtype),
    }
    if cfg.emit_init:
        named["init"] = jax.ShapeDtypeStruct((walk.batch, walk.heads, walk.width, walk.key), F32)
    return named


def _reverse_body(cfg, *refs):
    walk = cfg.walk
    names = ["q", "k", "dy", "a", "t", "numbers"]
    names += ["t_rest"] * walk.exact + ["real"] * walk.segments + ["final"] * cfg.has_final
    ins, outs = dict(zip(names, refs)), dict(zip(_reverse_outputs(cfg), refs[len(names) :]))
    wg, idx = lax.axis_index("wg"), (lax.axis_index("batch"), lax.axis_index("head"))
    tile = functools.partial(plgpu.SMEM, dtype=walk.dtype, transforms=BF16_TRANSFORMS)
    scratch = {
        "q": tile((STAGES, TILE, walk.key)),
        "k": tile((STAGES, TILE, walk.key)),
        "dy": tile((STAGES, walk.parts, TILE, TILE)),
        "a": tile((STAGES, TILE, TILE)),
        "t": tile((STAGES, TILE, TILE)),
        "t_rest": tile((STAGES, TILE, TILE)) if walk.exact else None,
        "out": tile((walk.parts, walk.key // TILE, TILE, TILE)),
        "numbers": plgpu.SMEM((STAGES, NUMBERS, TILE), F32),
        "real": plgpu.SMEM((STAGES, TILE), F32) if walk.segments else None,
    }
    barriers = {
        "full": plgpu.Barrier(num_arrivals=5 + walk.parts + walk.segments + walk.exact, num_barriers=STAGES),
        "empty": plgpu.Barrier(num_arrivals=walk.parts, num_barriers=STAGES),
    }

    def scoped(smem, bars):
        @pl.when(wg < walk.parts)
        def _():
            plgpu.set_max_registers(232, action="increase")
            _reverse_states(cfg, idx, ins, outs, smem, bars, wg)

        @pl.when(wg == walk.parts)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            in_one_warp(lambda: _reverse_produce(cfg, idx, ins, smem, bars))

    pl.run_scoped(scoped, scratch, barriers, collective_axes="wg")


@functools.partial(jax.jit, static_argnums=0)  # so that calls alike are traced and lowered once
def reverse(cfg, q, k, dy, a, t, numbers, t_rest, real, final):
    """Runs the walk in reverse; returns its outputs by name: dv ``[B, T, H, P]``, grads ``[B, chunks, H, P, N]``, init.

    ``grads`` are the gradients of the state that leaves each chunk, ``init`` that of the initial state.
    """
    out = _reverse_outputs(cfg)
    kernel = plgpu.kernel(
        named_body("gated_delta_rule_reverse_walk", _reverse_body, cfg),
        out_type=list(out.values()),
        grid=(cfg.walk.batch, cfg.walk.heads),
        grid_names=("batch", "head"),
        num_threads=cfg.walk.parts + 1,
        thread_name="wg",
        compiler_params=LANE_PARAMS,
    )
    args = [q, k, dy, a, t, numbers, t_rest if cfg.walk.exact else None]
    args += [real if cfg.walk.segments else None, final if cfg.has_final else None]
    return dict(zip(out, call_varying(kernel, *(v for v in args if v is not None))))


def _dots(tile, values):
    """Of each row: the product of a tile of shared memory with an array of its shape."""
    total = plgpu.layout_cast(jnp.zeros(TILE, F32), ROW)
    for n in range(0, tile.shape[-1], TILE):
        total += jnp.sum(load_tile(tile.at[:, pl.ds(n, TILE)]) * values[:, n : n + TILE], axis=1)
    return total


def _beta(smem, slot, layout):
    return jnp.maximum(vector(smem["numbers"].at[slot, BETA], layout), SMALLEST_BETA)


def _store_rows(cfg, smem, slot, tile, per, values, dots, targets):
    """A tile of a gradient of q or k to shared memory, less what its length takes, by TILE columns."""
    lengths = vector(smem["numbers"].at[slot, per], ROW)
    along = lengths * lengths * dots
    for n in range(cfg.key // TILE):
        part = values[:, n * TILE : (n + 1) * TILE]
        if cfg.normalize:
            part -= load_tile(tile.at[:, pl.ds(n * TILE, TILE)]) * rows_of(along)
        targets[n] = part.astype(cfg.dtype)
    plgpu.commit_smem()


def _copy_rows(cfg, sources, target, where):
    b, chunk, head = where
    for n in range(cfg.key // TILE):
        rows, cut = pl.ds(chunk * TILE, TILE), pl.ds(n * TILE, TILE)
        plgpu.copy_smem_to_gmem(sources.at[n], target.at[b, rows, head, cut])


def _query_tile(cfg, i, where, outs, smem, bars):
    """dq of a tile, and F and H for the other warpgroup."""
    slot = lax.rem(i, STAGES)
    q, k, numbers = smem["q"].at[slot], smem["k"].at[slot], smem["numbers"].at[slot]
    plgpu.barrier_wait(bars["full"].at[slot])
    clear_padding(cfg, smem, slot, q, k)

    def work(d_q, of_y, of_v):
        crossing = plgpu.layout_cast(jnp.zeros(TILE, F32), ROW)
        for part in range(cfg.parts):
            ring = lax.rem(i * cfg.parts + part, STAGES)
            plgpu.barrier_wait(bars["part_full"].at[ring])
            dy, u, dv = (smem[name].at[ring] for name in ("dy", "u", "dv"))
            state, grad = smem["state"].at[ring], smem["grad"].at[ring]
            clear_padding(cfg, smem, slot, dy)
            plgpu.wgmma(of_y, dy, u.T)
            plgpu.wgmma(of_v, dv, u.T)
            plgpu.wgmma(d_q, dy, state)
            for n in range(0, cfg.key, TILE):
                cut = (slice(None), pl.ds(n, TILE))
                crossing += jnp.sum(load_tile(state.at[cut]) * load_tile(grad.at[cut]), axis=1)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(bars["part_empty"].at[ring])
        pair = rows_of(vector(numbers.at[DECAY], ROW)) - cols_of(vector(numbers.at[DECAY]))
        pair = jnp.exp2(jnp.minimum(pair, 0.0))
        pair *= cols_of(vector(numbers.at[PER_K]) * _beta(smem, slot, COL))
        asked = sums_of(of_y) * pair * rows_of(vector(numbers.at[PER_Q], ROW) * cfg.scale)
        mixed = sums_of(of_v) * pair * rows_of(vector(numbers.at[PER_K], ROW))

        @pl.when(i > 0)
        def _():
            plgpu.barrier_wait(bars["pairs_empty"].at[0])

        smem["pairs"][0] = threads.keep_lower(asked).astype(cfg.dtype)
        smem["pairs"][1] = threads.keep_strictly_lower(-mixed).astype(cfg.dtype)
        smem["sums"][1] = crossing
        plgpu.commit_smem()
        plgpu.barrier_arrive(bars["pairs_full"].at[0])
        d_q[...] = sums_of(d_q) * rows_of(vector(numbers.at[FROM_STATE_Q], ROW), cfg.key)
        plgpu.wgmma(d_q, smem["pairs"].at[0], k)
        return sums_of(d_q)

    d_q = accumulate(work, cfg.key, TILE, TILE)
    dots = _dots(q, d_q)
    smem["sums"][0] = dots
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    _store_rows(cfg, smem, slot, q, PER_Q, d_q, dots, smem["dq"])
    plgpu.barrier_arrive(bars["sums_full"].at[0])
    plgpu.barrier_arrive(bars["empty"].at[slot])
    _copy_rows(cfg, smem["dq"], outs["dq"], where)


def _key_tile(cfg, i, where, outs, smem, bars):
    """dk of a tile, and the gradients of its decays and betas."""
    b, chunk, head = where
    slot = lax.rem(i, STAGES)
    q, k, numbers = smem["q"].at[slot], smem["k"].at[slot], smem["numbers"].at[slot]
    plgpu.barrier_wait(bars["full"].at[slot])
    clear_padding(cfg, smem, slot, q, k)

    def work(back, onward):
        for part in range(cfg.parts):
            ring = lax.rem(i * cfg.parts + part, STAGES)
            plgpu.barrier_wait(bars["part_full"].at[ring])
            u, dv = smem["u"].at[ring], smem["dv"].at[ring]
            plgpu.wgmma(back, dv, smem["state"].at[ring])
            plgpu.wgmma(onward, u, smem["grad"].at[ring])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(bars["part_empty"].at[ring])
        back[...] = sums_of(back) * -rows_of(vector(numbers.at[FROM_STATE_K], ROW), cfg.key)
        weight = vector(numbers.at[TO_STATE], ROW) * _beta(smem, slot, ROW)
        value = sums_of(onward) * rows_of(weight, cfg.key)
        at_end = _dots(k, value)
        onward[...] = value
        plgpu.barrier_wait(bars["pairs_full"].at[0])
        plgpu.wgmma(back, smem["pairs"].at[1], k)
        plgpu.wgmma(onward, smem["pairs"].at[0].T, q)
        plgpu.wgmma(onward, smem["pairs"].at[1].T, k)
        return sums_of(back), sums_of(onward), at_end

    back, onward, at_end = accumulate(work, cfg.key, cfg.key)
    dots_back, dots_onward = _dots(k, back), _dots(k, onward)
    plgpu.barrier_wait(bars["sums_full"].at[0])  # the other warpgroup has read the pairs, too
    _store_rows(cfg, smem, slot, k, PER_K, back + onward, dots_back + dots_onward, smem["pairs"])
    _copy_rows(cfg, smem["pairs"], outs["dk"], where)
    sums = smem["sums"]
    net = vector(sums.at[0], ROW) + dots_back - dots_onward
    crossing = vector(sums.at[1], ROW) * jnp.exp2(numbers[DECAY, TILE - 1])
    smem["gradients"][1] = dots_onward / _beta(smem, slot, ROW)
    smem["net"][0] = net
    smem["net"][1] = at_end + crossing
    plgpu.commit_smem()
    later = threads.keep_upper(cols_of(vector(smem["net"].at[0]))) + cols_of(vector(smem["net"].at[1]))
    smem["gradients"][0] = jnp.sum(later, axis=1) * math.log(2.0)
    plgpu.commit_smem()
    plgpu.barrier_arrive(bars["empty"].at[slot])
    plgpu.copy_smem_to_gmem(smem["gradients"], outs["gates"].at[b, chunk, head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(bars["pairs_empty"].at[0])


def _tile_produce(cfg, i, where, ins, smem, bars):
    b, chunk, head = where
    group = lax.div(head, cfg.heads // cfg.groups)
    rows, slot = pl.ds(chunk * TILE, TILE), lax.rem(i, STAGES)

    @pl.when(i >= STAGES)
    def _():
        plgpu.barrier_wait(bars["empty"].at[slot])

    bar = bars["full"].at[slot]
    for name in ("q", "k"):
        plgpu.copy_gmem_to_smem(ins[name].at[b, rows, group], smem[name].at[slot], bar)
    plgpu.copy_gmem_to_smem(ins["numbers"].at[b, chunk, head], smem["numbers"].at[slot], bar)
    if cfg.segments:
        plgpu.copy_gmem_to_smem(ins["real"].at[b, chunk], smem["real"].at[slot], bar)
    for part in range(cfg.parts):
        count = i * cfg.parts + part
        ring, channels = lax.rem(count, STAGES), pl.ds(part * TILE, TILE)

        @pl.when(count >= STAGES)
        def _():
            plgpu.barrier_wait(bars["part_empty"].at[ring])

        bar = bars["part_full"].at[ring]
        for name in ("dy", "u", "dv"):
            plgpu.copy_gmem_to_smem(ins[name].at[b, rows, head, channels], smem[name].at[ring], bar)
        for name in ("state", "grad"):
            plgpu.copy_gmem_to_smem(ins[name].at[b, chunk, head, channels], smem[name].at[ring], bar)


def _tile_outputs(cfg):
    rows = jax.ShapeDtypeStruct((cfg.batch, cfg.tokens, cfg.heads, cfg.key), cfg.dtype)
    gates = jax.ShapeDtypeStruct((cfg.batch, cfg.chunks, cfg.heads, 2, TILE), F32)
    return {"dq": rows, "dk": rows, "gates": gates}


def _tile_scratch(cfg):
    tile = functools.partial(plgpu.SMEM, dtype=cfg.dtype, transforms=BF16_TRANSFORMS)
    return {
        **{name: tile((STAGES, TILE, cfg.key)) for name in ("q", "k")},
        **{name: tile((STAGES, TILE, TILE)) for name in ("dy", "u", "dv")},
        **{name: tile((STAGES, TILE, cfg.key)) for name in ("state", "grad")},
        "pairs": tile((2, TILE, TILE)),
        "dq": tile((cfg.key // TILE, TILE, TILE)),
        "numbers": plgpu.SMEM((STAGES, NUMBERS, TILE), F32),
        "real": plgpu.SMEM((STAGES, TILE), F32) if cfg.segments else None,
        "sums": plgpu.SMEM((2, TILE), F32),
        "net": plgpu.SMEM((2, TILE), F32),
        "gradients": plgpu.SMEM((2, TILE), F32),
    }


def _tile_barriers(cfg):
    one = functools.partial(plgpu.Barrier, num_arrivals=1, num_barriers=1)
    return {
        "full": plgpu.Barrier(num_arrivals=3 + cfg.segments, num_barriers=STAGES),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "part_full": plgpu.Barrier(num_arrivals=5, num_barriers=STAGES),
        "part_empty": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "pairs_full": one(),
        "pairs_empty": one(),
        "sums_full": one(),
    }


def _tile_body(cfg, blocks, *refs):
    names = ["q", "k", "dy", "u", "dv", "state", "grad", "numbers"] + ["real"] * cfg.segments
    ins, outs = dict(zip(names, refs)), dict(zip(_tile_outputs(cfg), refs[len(names) :]))
    wg, block = lax.axis_index("wg"), lax.axis_index("block")
    tiles = cfg.batch * cfg.heads * cfg.chunks
    steps = (tiles - block + blocks - 1) // blocks

    def each(work):
        def step(i, _):
            index = block + i * blocks
            rest = lax.div(index, cfg.chunks)
            work(i, (lax.div(rest, cfg.heads), lax.rem(index, cfg.chunks), lax.rem(rest, cfg.heads)))
            return None

        lax.fori_loop(0, steps, step, None)

    def scoped(smem, bars):
        @pl.when(wg == 0)
        def _():
            plgpu.set_max_registers(240, action="increase")
            each(lambda i, where: _query_tile(cfg, i, where, outs, smem, bars))
            plgpu.barrier_wait(bars["pairs_empty"].at[0])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 1)
        def _():
            plgpu.set_max_registers(240, action="increase")
            each(lambda i, where: _key_tile(cfg, i, where, outs, smem, bars))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            def produce():
                each(lambda i, where: _tile_produce(cfg, i, where, ins, smem, bars))
                drain(steps, STAGES, [bars["empty"]])
                drain(steps * cfg.parts, STAGES, [bars["part_empty"]])

            in_one_warp(produce)

    pl.run_scoped(scoped, _tile_scratch(cfg), _tile_barriers(cfg), collective_axes="wg")


@functools.partial(jax.jit, static_argnums=(0, 1))  # so that calls alike are traced and lowered once
def tiles(cfg, blocks, *args):
    """All other gradients by name: dq, dk ``[B, T, H, N]`` and, as they came, of gates ``[B, chunks, H, 2, 64]``."""
    out = _tile_outputs(cfg)
    kernel = plgpu.kernel(
        named_body("gated_delta_rule_gradients", _tile_body, cfg, blocks),
        out_type=list(out.values()),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        compiler_params=LANE_PARAMS,
    )
    return dict(zip(out, call_varying(kernel, *(v for v in args if v is not None))))


def gradients(cfg, q, k, real, kept, dy, d_final):
    """(dq, dk, dv, those of log2 decays and betas ``[B, chunks, H, 2, 64]``, that of the initial state or None)."""
    turned = Reverse(cfg, d_final is not None, cfg.has_init)
    solved = (kept[name] for name in ("a", "t", "numbers"))
    back = reverse(turned, q, k, dy, *solved, kept.get("t_rest"), real, d_final)
    blocks = min(platform.multiprocessors(), cfg.batch * cfg.heads * cfg.chunks)
    states = (kept["states"], back["grads"])
    out = tiles(cfg, blocks, q, k, dy, kept["written"], back["dv"], *states, kept["numbers"], real)
    dq, dk = (of_groups(out[name], cfg.groups) for name in ("dq", "dk"))
    return dq, dk, back["dv"], out["gates"], back.get("init")


def of_groups(array, groups):
    """Sums of the heads of each group."""
    if array.shape[2] == groups:
        return array
    parts = array.reshape(*array.shape[:2], groups, -1, array.shape[3])
    return parts.astype(F32).sum(3).astype(array.dtype)
