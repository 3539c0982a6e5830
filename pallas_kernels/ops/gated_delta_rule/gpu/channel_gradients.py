# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel of all gradients of the gated delta rule by key channel but that of the values.

In the words of `backward` and `channel_chunks`, with S the state that enters a chunk and R the gradient of that which
leaves it, ``F_ij = beta_j (dy_i . U_j)`` for j <= i, ``H_ij = -beta_j (dV_i . U_j)`` for j < i and
``E_ij[n] = exp2(a_in - a_jn)``, its other gradients are

    dq_i = exp2(a_i) o S dy_i + sum_j F_ij E_ij o k_j
    dk_i = [sum_j H_ij E_ij o k_j - exp2(a_i) o S dV_i]
         + [beta_i exp2(a_end - a_i) o R U_i + sum_j F_ji E_ji o q_j + H_ji E_ji o k_j]

by the levels of `channel_chunks`, four products each. The gradient of ``a_i`` is, by channel, q_i o dq_i +
k_i o (first) - k_i o (second), and that of beta_i is k_i . (second) / beta_i. A pair stands on both sides of the former
with the same rounded operands, so what does not cross a token cancels to float32 accuracy.

A thread block takes one chunk of one head after the other; a producer streams them, and one warpgroup per 64 key
channels computes. Of two, the first multiplies F and the second H.
"""

import functools

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
from pallas_kernels.ops.gated_delta_rule.gpu.backward import SMALLEST_BETA
from pallas_kernels.ops.gated_delta_rule.gpu.channel_chunks import PER_K, PER_Q, log2_decays, weigh
from pallas_kernels.ops.gated_delta_rule.gpu.forward import LANE_PARAMS, clear_padding, vector
from pallas_kernels.varying import call_varying

STAGES = 2
F_PAIRS, H_PAIRS = 0, 1  # tiles of "pairs"
OF_NET, OF_END, DECAYS = 0, 1, 2  # "totals" of a warpgroup, by 16 tokens; the former two of gradients
OF_Q, OF_K, OF_BETA = 0, 1, 2  # rows of "sums" of a warpgroup


def _beta(smem, layout):
    return jnp.maximum(vector(smem["beta"], layout), SMALLEST_BETA)


def _meet(cfg, bar):
    """Waits for the other warpgroup, if there is one."""
    if cfg.key > TILE:
        plgpu.barrier_arrive(bar)
        plgpu.barrier_wait(bar)


def _store_pairs(cfg, smem, which, products):
    """F or H, with lengths, to shared memory; `which` may be known at run time only."""
    per_k = cols_of(vector(smem["lengths"].at[PER_K]) * _beta(smem, COL))
    factor = jnp.where(which == F_PAIRS, cfg.scale, -1.0)
    products = products * rows_of(vector(smem["lengths"].at[which], ROW) * factor) * per_k
    own = threads.keep_diagonal(products) * jnp.where(which == F_PAIRS, 1.0, 0.0)
    smem["pairs"][0, which] = (threads.keep_strictly_lower(products) + own).astype(cfg.dtype)


def _from_states(cfg, i, smem, bars, wg):
    """(S dy, S dV, R U, sums of S o R over value channels by row); stores F, H or both."""
    part_of = (wg,) if cfg.key > TILE else (F_PAIRS, H_PAIRS)

    def work(d_q, back, onward, *pairs):
        def part(p, crossing):
            ring = lax.rem(i * cfg.parts + p, STAGES)
            plgpu.barrier_wait(bars["part_full"].at[ring])
            given, u = smem["given"].at[ring], smem["u"].at[ring]
            state, grad = (smem[name].at[ring, wg] for name in ("state", "grad"))
            clear_padding(cfg, smem, 0, given.at[F_PAIRS])
            for which, acc in zip(part_of, pairs, strict=True):
                plgpu.wgmma(acc, given.at[which], u.T)
            plgpu.wgmma(d_q, given.at[F_PAIRS], state)
            plgpu.wgmma(back, given.at[H_PAIRS], state)
            plgpu.wgmma(onward, u, grad)
            crossing += load_tile(state) * load_tile(grad)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(bars["part_empty"].at[ring])
            return crossing

        crossing = zeros(TILE)
        for p in range(cfg.parts):
            crossing = part(p, crossing)
        for which, acc in zip(part_of, pairs, strict=True):
            _store_pairs(cfg, smem, which, sums_of(acc))
        return sums_of(d_q), sums_of(back), sums_of(onward), crossing

    return accumulate(work, *[TILE] * (3 + len(part_of)))


def _product(left, right):
    def work(acc):
        plgpu.wgmma(acc, left, right)
        return sums_of(acc)

    return accumulate(work, TILE)


def _level(cfg, smem, wg, bits, found):
    """Adds the pairs of a level to (dq, dk, gradient of a, k . (second))."""
    d_q, d_k, net, dots = found
    zero = threads.hidden_zero()
    weight = jnp.exp2(threads.distance(smem["decays"].at[wg], bits))
    weighed, pairs = smem["weighed"].at[wg + zero], smem["pairs"].at[zero]
    of = lambda which, back: threads.keep_level(
        plgpu.load(pairs.at[which].T if back else pairs.at[which], layout=WGMMA), bits, back
    )
    plgpu.commit_smem()  # all have read what the level before has left
    keys = weigh(smem["k"].at[wg + zero], weight, cfg.dtype)
    weighed[...] = keys
    plgpu.commit_smem()
    more = _product(of(F_PAIRS, False), weighed)
    d_q += more * weight
    queries = weigh(smem["q"].at[wg + zero], weight, cfg.dtype)
    net += more * queries.astype(F32)
    more = _product(of(H_PAIRS, False), weighed)
    d_k += more * weight
    net += more * keys.astype(F32)

    def onward(acc):
        plgpu.wgmma(acc, of(H_PAIRS, True), weighed)
        plgpu.wgmma_wait(0)
        plgpu.commit_smem()  # all have read the keys
        weighed[...] = queries
        plgpu.commit_smem()
        plgpu.wgmma(acc, of(F_PAIRS, True), weighed)
        return sums_of(acc)

    more = accumulate(onward, TILE)
    d_k += more * weight
    more *= keys.astype(F32)
    return d_q, d_k, net - more, dots + jnp.sum(more, axis=1)


def _own_pairs(smem, wg, found):
    """Adds what token i hands to itself: as a_i - a_i = 0, nothing to the gradient of a."""
    d_q, d_k, net, dots = found
    own = jnp.sum(threads.keep_diagonal(load_tile(smem["pairs"].at[0, F_PAIRS])), axis=1)
    q, k = (load_tile(smem[name].at[wg]) for name in ("q", "k"))
    return d_q + k * rows_of(own), d_k + q * rows_of(own), net, dots + own * jnp.sum(q * k, axis=1)


def _states_part(cfg, i, where, ins, smem, bars, wg):
    """What comes from the states of (dq, dk, gradient of a, k . (second))."""
    b, chunk, head = where
    channels, totals, decays = pl.ds(wg * TILE, TILE), smem["totals"].at[wg], smem["decays"].at[wg]
    plgpu.barrier_wait(bars["full"])
    clear_padding(cfg, smem, 0, smem["q"].at[wg], smem["k"].at[wg])
    steps = ins["g"].at[b, pl.ds(chunk * TILE, TILE), head, channels]
    sums = threads.sums_upto(log2_decays(cfg, steps, smem["real"].at[0] if cfg.segments else None))
    threads.store_totals_upto(totals.at[DECAYS], sums)
    plgpu.commit_smem()
    threads.store_padded(decays, sums + threads.others["before"](totals.at[DECAYS]))
    d_q, back, onward, crossing = _from_states(cfg, i, smem, bars, wg)
    upto = plgpu.load(decays.at[:, pl.ds(0, TILE)], layout=WGMMA, optimized=False)
    whole = threads.others["all"](totals.at[DECAYS])
    per_k = vector(smem["lengths"].at[PER_K], ROW)
    d_q *= jnp.exp2(upto) * rows_of(vector(smem["lengths"].at[PER_Q], ROW) * cfg.scale)
    back *= jnp.exp2(upto) * rows_of(-per_k)
    onward *= jnp.exp2(whole - upto) * rows_of(per_k * _beta(smem, ROW))
    keys = load_tile(smem["k"].at[wg])
    net = load_tile(smem["q"].at[wg]) * d_q + keys * back
    at_end = keys * onward
    net -= at_end
    threads.store_totals_upto(totals.at[OF_END], threads.sums_upto(at_end + crossing * jnp.exp2(whole)))
    return d_q, back + onward, net, jnp.sum(at_end, axis=1)


def _compute(cfg, i, where, ins, outs, smem, bars, wg):
    """64 key channels of a tile."""
    b, chunk, head = where
    rows, channels = pl.ds(chunk * TILE, TILE), pl.ds(wg * TILE, TILE)
    found = _states_part(cfg, i, where, ins, smem, bars, wg)
    plgpu.commit_smem()
    _meet(cfg, bars["pairs"])
    found = lax.fori_loop(0, threads.LEVELS, lambda bits, found: _level(cfg, smem, wg, bits, found), found)
    d_q, d_k, net, dots = _own_pairs(smem, wg, found)
    net = threads.sums_from(net)
    threads.store_totals_from(smem["totals"].at[wg, OF_NET], net)
    smem["sums"][wg, OF_Q] = jnp.sum(load_tile(smem["q"].at[wg]) * d_q, axis=1)
    smem["sums"][wg, OF_K] = jnp.sum(load_tile(smem["k"].at[wg]) * d_k, axis=1)
    smem["sums"][wg, OF_BETA] = dots
    plgpu.commit_smem()
    _meet(cfg, bars["sums"])
    _write(cfg, where, outs, smem, wg, (d_q, d_k))
    own, end = (smem["totals"].at[wg, n] for n in (OF_NET, OF_END))
    net += threads.others["behind"](own) + threads.others["all"](end)
    if cfg.segments:
        net = jnp.where(rows_of(vector(smem["real"].at[0], ROW)) > 0.0, net, 0.0)
    outs["dg"][b, rows, head, channels] = net
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(bars["empty"])


def _write(cfg, where, outs, smem, wg, gradients):
    """dq and dk, less what their lengths take, in place of q and k; the gradient of beta."""
    b, chunk, head = where
    rows, channels = pl.ds(chunk * TILE, TILE), pl.ds(wg * TILE, TILE)
    n_slices = cfg.key // TILE
    summed = lambda row: sum(vector(smem["sums"].at[n, row], ROW) for n in range(n_slices))
    rest = zip(("q", "k"), (OF_Q, OF_K), (PER_Q, PER_K), gradients, strict=True)
    for name, row, per, gradient in rest:
        if cfg.normalize:
            lengths = vector(smem["lengths"].at[per], ROW)
            gradient -= load_tile(smem[name].at[wg]) * rows_of(lengths * lengths * summed(row))
        smem[name][wg] = gradient.astype(cfg.dtype)
    smem["dbeta"][wg] = summed(OF_BETA) / _beta(smem, ROW)  # the same of each warpgroup
    plgpu.commit_smem()
    for name in ("q", "k"):
        plgpu.copy_smem_to_gmem(smem[name].at[wg], outs["d" + name].at[b, rows, head, channels])

    @pl.when(wg == 0)
    def _():
        plgpu.copy_smem_to_gmem(smem["dbeta"].at[0], outs["dbeta"].at[b, chunk, head])


def _produce(cfg, i, where, ins, smem, bars):
    b, chunk, head = where
    group = lax.div(head, cfg.heads // cfg.groups)
    rows = pl.ds(chunk * TILE, TILE)

    @pl.when(i > 0)
    def _():
        plgpu.barrier_wait(bars["empty"])

    keys = [pl.ds(n * TILE, TILE) for n in range(cfg.key // TILE)]
    for name in ("q", "k"):
        for n, channels in enumerate(keys):
            plgpu.copy_gmem_to_smem(ins[name].at[b, rows, group, channels], smem[name].at[n], bars["full"])
    for name in ("lengths", "beta"):
        plgpu.copy_gmem_to_smem(ins[name].at[b, chunk, head], smem[name], bars["full"])
    if cfg.segments:
        plgpu.copy_gmem_to_smem(ins["real"].at[b, chunk], smem["real"].at[0], bars["full"])
    for part in range(cfg.parts):
        count = i * cfg.parts + part
        ring, values = lax.rem(count, STAGES), pl.ds(part * TILE, TILE)

        @pl.when(count >= STAGES)
        def _():
            plgpu.barrier_wait(bars["part_empty"].at[ring])

        bar = bars["part_full"].at[ring]
        tiles = {"dy": smem["given"].at[ring, F_PAIRS], "dv": smem["given"].at[ring, H_PAIRS], "u": smem["u"].at[ring]}
        for name, tile in tiles.items():
            plgpu.copy_gmem_to_smem(ins[name].at[b, rows, head, values], tile, bar)
        for name in ("state", "grad"):
            for n, channels in enumerate(keys):
                source = ins[name].at[b, chunk, head, values, channels]
                plgpu.copy_gmem_to_smem(source, smem[name].at[ring, n], bar)


def _outputs(cfg):
    rows = (cfg.batch, cfg.tokens, cfg.heads, cfg.key)
    return {
        "dq": jax.ShapeDtypeStruct(rows, cfg.dtype),
        "dk": jax.ShapeDtypeStruct(rows, cfg.dtype),
        "dg": jax.ShapeDtypeStruct(rows, F32),
        "dbeta": jax.ShapeDtypeStruct((cfg.batch, cfg.chunks, cfg.heads, TILE), F32),
    }


def _scratch(cfg):
    tile = functools.partial(plgpu.SMEM, dtype=cfg.dtype, transforms=BF16_TRANSFORMS)
    n_slices = cfg.key // TILE
    return {
        **{name: tile((n_slices, TILE, TILE)) for name in ("q", "k")},
        "given": tile((STAGES, 2, TILE, TILE)),
        "u": tile((STAGES, TILE, TILE)),
        **{name: tile((STAGES, n_slices, TILE, TILE)) for name in ("state", "grad")},
        "pairs": tile((1, 2, TILE, TILE)),
        "weighed": tile((n_slices, TILE, TILE)),
        "decays": plgpu.SMEM((n_slices, TILE, threads.PADDED), F32),
        "totals": plgpu.SMEM((n_slices, 3, TILE // threads.BLOCK, TILE), F32),
        "sums": plgpu.SMEM((n_slices, 3, TILE), F32),
        "lengths": plgpu.SMEM((2, TILE), F32),
        "beta": plgpu.SMEM((TILE,), F32),
        "dbeta": plgpu.SMEM((n_slices, TILE), F32),
        "real": plgpu.SMEM((1, TILE), F32) if cfg.segments else None,
    }


def _barriers(cfg):
    n_slices = cfg.key // TILE
    return {
        "full": plgpu.Barrier(num_arrivals=2 + 2 * n_slices + cfg.segments),
        "empty": plgpu.Barrier(num_arrivals=n_slices),
        "part_full": plgpu.Barrier(num_arrivals=3 + 2 * n_slices, num_barriers=STAGES),
        "part_empty": plgpu.Barrier(num_arrivals=n_slices, num_barriers=STAGES),
        "pairs": plgpu.Barrier(num_arrivals=n_slices),
        "sums": plgpu.Barrier(num_arrivals=n_slices),
    }


def _inputs(cfg):
    names = ["q", "k", "g", "dy", "u", "dv", "state", "grad", "lengths", "beta"]
    return names + ["real"] * cfg.segments


def _body(cfg, blocks, *refs):
    names, n_slices = _inputs(cfg), cfg.key // TILE
    ins, outs = dict(zip(names, refs)), dict(zip(_outputs(cfg), refs[len(names) :]))
    wg, block = lax.axis_index("wg"), lax.axis_index("block")
    steps = (cfg.batch * cfg.heads * cfg.chunks - block + blocks - 1) // blocks

    def each(work):
        def step(i, _):
            index = block + i * blocks
            rest = lax.div(index, cfg.chunks)
            work(i, (lax.div(rest, cfg.heads), lax.rem(index, cfg.chunks), lax.rem(rest, cfg.heads)))
            return None

        lax.fori_loop(0, steps, step, None)

    def scoped(smem, bars):
        @pl.when(wg < n_slices)
        def _():
            plgpu.set_max_registers(240, action="increase")
            each(lambda i, where: _compute(cfg, i, where, ins, outs, smem, bars, wg))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == n_slices)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            def produce():
                each(lambda i, where: _produce(cfg, i, where, ins, smem, bars))
                plgpu.barrier_wait(bars["empty"])
                drain(steps * cfg.parts, STAGES, [bars["part_empty"]])

            in_one_warp(produce)

    pl.run_scoped(scoped, _scratch(cfg), _barriers(cfg), collective_axes="wg")


@functools.partial(jax.jit, static_argnums=(0, 1))  # so that calls alike are traced and lowered once
def _tiles(cfg, blocks, arrays):
    out = _outputs(cfg)
    kernel = plgpu.kernel(
        named_body("gated_delta_rule_channel_gradients", _body, cfg, blocks),
        out_type=list(out.values()),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=cfg.key // TILE + 1,
        thread_name="wg",
        compiler_params=LANE_PARAMS,
    )
    return dict(zip(out, call_varying(kernel, *(arrays[name] for name in _inputs(cfg)))))


def gradients(cfg, arrays):
    """By name: dq, dk of each head and dg ``[B, T, H, N]``, dbeta ``[B, chunks, H, 64]``.

    Of arrays by name: q, k, g, beta, real and lengths as in `channel_chunks`, u what `channel_walk` calls written, dy
    and dv ``[B, T, H, P]``, state that enters and grad of that which leaves each chunk ``[B, chunks, H, P, N]``.
    """
    blocks = min(platform.multiprocessors(), cfg.batch * cfg.heads * cfg.chunks)
    return _tiles(cfg, blocks, {name: arrays[name] for name in _inputs(cfg)})
