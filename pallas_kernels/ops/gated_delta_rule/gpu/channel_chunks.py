# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel of what the gated delta rule needs no state for, where each key channel decays by itself.

One warpgroup takes one chunk of 64 tokens of one head, of which with ``a`` the within-chunk cumulative log2 decay of
each channel it stores

    A_ij = scale sum_n q_in k_jn exp2(a_in - a_jn), j <= i      B_ij = sum_n k_in k_jn exp2(a_in - a_jn), j < i
    T    = (1 + B diag(beta))^-1
    from_q = scale exp2(a) q     from_k = exp2(a) k     to_state = exp2(a_end - a) k     a_end

(Kimi Team 2025, arXiv:2510.26692, section 3, with beta on the other side of the inverse as in `forward`).

**Weights of pairs do not factor** over a chunk: exp2(-a_j) overflows. They do by halves: of a block of 2 w tokens, each
in the right half sees those in the left half through the middle, ``exp2(a_i - a_mid) exp2(a_mid - a_j)``, both at most
1. So a chunk is six levels, w = 32 to 1, each one product of 64 tokens of which the level's pairs are kept; a token is
in the left or the right half of its block, so it has one weight a level. No number overflows, whatever the decays.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import (
    BF16_TRANSFORMS,
    F32,
    F32_TRANSFORMS,
    LOG2E,
    ROW,
    TILE,
    WGMMA,
    accumulate,
    cols_of,
    load_tile,
    named_body,
    rows_of,
    sums_of,
)
from pallas_kernels.ops.gated_delta_rule.gpu import threads
from pallas_kernels.ops.gated_delta_rule.gpu.forward import (
    FORGOTTEN,
    LANE_PARAMS,
    LENGTH_EPS,
    clear_padding,
    documented,
    vector,
)
from pallas_kernels.ops.gated_delta_rule.gpu.inverse import SCRATCH, unit_inverse
from pallas_kernels.varying import call_varying

PER_Q, PER_K = 0, 1  # rows of "lengths": 1 / length of the token's query and key


def slices(cfg):
    """(index, channels) of the 64 channels that a warpgroup works on at a time."""
    return [(n, pl.ds(n * TILE, TILE)) for n in range(cfg.key // TILE)]


def log2_decays(cfg, source, real):
    """float32 [64, 64] of a chunk's tokens; `real` the slot of marks in shared memory."""
    steps = jnp.maximum(plgpu.load(source, layout=WGMMA, optimized=False) * LOG2E, FORGOTTEN)
    return documented(cfg, steps, real, rows_of)


def weigh(tile, channels, weight, dtype):
    """64 channels of a tile of shared memory, times a weight each."""
    return (load_tile(tile.at[:, channels]) * weight).astype(dtype)


def _squares(cfg, tile):
    total = plgpu.layout_cast(jnp.zeros(TILE, F32), ROW)
    for _, channels in slices(cfg):
        part = load_tile(tile.at[:, channels])
        total += jnp.sum(part * part, axis=1)
    return total


def _sum_decays(cfg, idx, ins, smem):
    """Sums of log2 decays within blocks of 16 to "sums", the blocks' totals, and those of the chunk."""
    b, chunk, head = idx
    for n, channels in slices(cfg):
        steps = ins["g"].at[b, pl.ds(chunk * TILE, TILE), head, channels]
        sums = threads.sums_upto(log2_decays(cfg, steps, smem["real"].at[0] if cfg.segments else None))
        smem["sums"].at[:, channels][...] = sums
        threads.store_totals_upto(smem["totals"].at[n], sums)
    plgpu.commit_smem()
    for n, channels in slices(cfg):
        smem["ends"][channels] = sum(vector(smem["totals"].at[n, w]) for w in range(TILE // threads.BLOCK))


def _level(cfg, width, smem):
    """(A, B) of the pairs of a level, without lengths and beta."""
    q, k, keys = (smem[name] for name in ("q", "k", "keys"))

    def work(of_q, of_k):
        for n, channels in slices(cfg):
            sums = plgpu.load(smem["sums"].at[:, channels], layout=WGMMA)
            weight = jnp.exp2(threads.distance[width](sums, smem["totals"].at[n]))
            weighed = weigh(k, channels, weight, cfg.dtype)
            keys[n] = weighed
            plgpu.commit_smem()
            plgpu.wgmma(of_q, weigh(q, channels, weight, cfg.dtype), keys.at[n].T)
            plgpu.wgmma(of_k, weighed, keys.at[n].T)
        return sums_of(of_q), sums_of(of_k)

    pairs = accumulate(work, TILE, TILE)
    plgpu.commit_smem()  # all have read the keys
    return [threads.keep_level(product, width) for product in pairs]


def _pairs(cfg, smem):
    """(A, B diag(beta)) of the chunk."""
    asked, mixed = _level(cfg, threads.LEVELS[0], smem)
    for width in threads.LEVELS[1:]:
        more_asked, more_mixed = _level(cfg, width, smem)
        asked, mixed = asked + more_asked, mixed + more_mixed
    own = plgpu.layout_cast(jnp.zeros(TILE, F32), ROW)
    for _, channels in slices(cfg):
        own += jnp.sum(load_tile(smem["q"].at[:, channels]) * load_tile(smem["k"].at[:, channels]), axis=1)
    asked += threads.keep_diagonal(rows_of(own))
    per_k = cols_of(vector(smem["lengths"].at[PER_K]))
    asked *= rows_of(vector(smem["lengths"].at[PER_Q], ROW) * cfg.scale)
    mixed *= rows_of(vector(smem["lengths"].at[PER_K], ROW))
    return asked * per_k, mixed * per_k * cols_of(vector(smem["beta"]))


def _weigh_all(cfg, smem):
    """from_q and from_k in place of q and k, to_state in place of the keys of a level."""
    q, k = smem["q"], smem["k"]
    per_q = rows_of(vector(smem["lengths"].at[PER_Q], ROW) * cfg.scale)
    per_k = rows_of(vector(smem["lengths"].at[PER_K], ROW))
    for n, channels in slices(cfg):
        sums, totals = plgpu.load(smem["sums"].at[:, channels], layout=WGMMA), smem["totals"].at[n]
        upto = jnp.exp2(sums + threads.others["before"](totals))
        after = jnp.exp2(threads.others["all"](totals) - (sums + threads.others["before"](totals)))
        smem["keys"][n] = weigh(k, channels, after * per_k, cfg.dtype)
        q.at[:, channels][...] = weigh(q, channels, upto * per_q, cfg.dtype)
        k.at[:, channels][...] = weigh(k, channels, upto * per_k, cfg.dtype)


def _work(cfg, idx, ins, outs, smem, bar):
    b, chunk, head = idx
    group, rows = lax.div(head, cfg.heads // cfg.groups), pl.ds(chunk * TILE, TILE)
    plgpu.copy_gmem_to_smem(ins["k"].at[b, rows, group], smem["k"], bar)
    plgpu.copy_gmem_to_smem(ins["q"].at[b, rows, group], smem["q"], bar)
    plgpu.copy_gmem_to_smem(ins["beta"].at[b, chunk, head], smem["beta"], bar)
    if cfg.segments:
        plgpu.copy_gmem_to_smem(ins["real"].at[b, chunk], smem["real"].at[0], bar)
    plgpu.barrier_wait(bar)
    clear_padding(cfg, smem, 0, smem["q"], smem["k"])
    _sum_decays(cfg, idx, ins, smem)
    for name, row in (("q", PER_Q), ("k", PER_K)):
        squares = _squares(cfg, smem[name]) + LENGTH_EPS
        smem["lengths"][row] = lax.rsqrt(squares) if cfg.normalize else jnp.ones_like(squares)
    plgpu.commit_smem()
    asked, mixed = _pairs(cfg, smem)
    smem["a"][...] = asked.astype(cfg.dtype)
    _weigh_all(cfg, smem)
    plgpu.commit_smem()  # all have read the sums, in whose place the inverse works
    plgpu.copy_smem_to_gmem(smem["q"], outs["from_q"].at[b, rows, head])
    plgpu.copy_smem_to_gmem(smem["k"], outs["from_k"].at[b, rows, head])
    for n, channels in slices(cfg):
        plgpu.copy_smem_to_gmem(smem["keys"].at[n], outs["to_state"].at[b, rows, head, channels])
    for name in ("a", "ends", "lengths"):
        plgpu.copy_smem_to_gmem(smem[name], outs[name].at[b, chunk, head])
    unit_inverse(mixed, smem["t"], [smem["scratch"].at[n] for n in range(SCRATCH)])
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem["t"], outs["t"].at[b, chunk, head])
    plgpu.wait_smem_to_gmem(0)


def _outputs(cfg):
    rows = jax.ShapeDtypeStruct((cfg.batch, cfg.tokens, cfg.heads, cfg.key), cfg.dtype)
    pairs = jax.ShapeDtypeStruct((cfg.batch, cfg.chunks, cfg.heads, TILE, TILE), cfg.dtype)
    numbers = functools.partial(jax.ShapeDtypeStruct, dtype=F32)
    return {
        "from_q": rows,
        "from_k": rows,
        "to_state": rows,
        "a": pairs,
        "t": pairs,
        "ends": numbers((cfg.batch, cfg.chunks, cfg.heads, cfg.key)),
        "lengths": numbers((cfg.batch, cfg.chunks, cfg.heads, 2, TILE)),
    }


def _scratch(cfg):
    tile = functools.partial(plgpu.SMEM, dtype=cfg.dtype, transforms=BF16_TRANSFORMS)
    return {
        "q": tile((TILE, cfg.key)),
        "k": tile((TILE, cfg.key)),
        "keys": tile((cfg.key // TILE, TILE, TILE)),
        "a": tile((TILE, TILE)),
        "t": tile((TILE, TILE)),
        "sums or scratch": plgpu.RefUnion(
            plgpu.SMEM((TILE, cfg.key), F32, transforms=F32_TRANSFORMS), tile((SCRATCH, TILE, TILE))
        ),
        "totals": plgpu.SMEM((cfg.key // TILE, TILE // threads.BLOCK, TILE), F32),
        "ends": plgpu.SMEM((cfg.key,), F32),
        "beta": plgpu.SMEM((TILE,), F32),
        "real": plgpu.SMEM((1, 2, TILE), F32) if cfg.segments else None,
        "lengths": plgpu.SMEM((2, TILE), F32),
    }


def _body(cfg, *refs):
    names = ["q", "k", "g", "beta"] + ["real"] * cfg.segments
    ins, outs = dict(zip(names, refs)), dict(zip(_outputs(cfg), refs[len(names) :]))
    idx = tuple(lax.axis_index(name) for name in ("batch", "chunk", "head"))

    def scoped(smem, bar):
        sums, scratch = smem["sums or scratch"]
        smem = {**smem, "sums": sums, "scratch": scratch}
        _work(cfg, idx, ins, outs, smem, bar)

    pl.run_scoped(scoped, _scratch(cfg), plgpu.Barrier(num_arrivals=3 + cfg.segments))


@functools.partial(jax.jit, static_argnums=0)  # so that calls alike are traced and lowered once
def chunks(cfg, q, k, g, beta, real):
    """Its outputs by name, see `_outputs`.

    q, k ``[B, T, G, N]``, g ``[B, T, H, N]`` float32, beta ``[B, chunks, H, 64]``, real ``[B, chunks, 2, 64]`` or None.
    """
    out = _outputs(cfg)
    kernel = plgpu.kernel(
        named_body("gated_delta_rule_channel_chunks", _body, cfg),
        out_type=list(out.values()),
        grid=(cfg.heads, cfg.chunks, cfg.batch),
        grid_names=("head", "chunk", "batch"),
        compiler_params=LANE_PARAMS,
    )
    args = [q, k, g, beta, real if cfg.segments else None]
    return dict(zip(out, call_varying(kernel, *(v for v in args if v is not None))))
