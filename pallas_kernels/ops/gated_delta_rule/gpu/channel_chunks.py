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
1. So a chunk is six levels, w = 1 to 32, each one product of 64 tokens of which the level's pairs are kept; a token is
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
    zeros,
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


def slices(cfg) -> int:
    """How often a warpgroup works on TILE channels."""
    return cfg.key // TILE


def log2_decays(cfg, source, real):
    """float32 [64, 64] of a chunk's tokens; `real` the slot of marks in shared memory."""
    steps = jnp.maximum(plgpu.load(source, layout=WGMMA, optimized=False) * LOG2E, FORGOTTEN)
    return documented(steps, rows_of(vector(real, ROW))) if cfg.segments else steps


def weigh(tile, weight, dtype):
    """A tile of shared memory, times a weight each."""
    return (load_tile(tile) * weight).astype(dtype)


def no_rows():
    """Zeros, one a row of a tile."""
    return plgpu.layout_cast(jnp.zeros(TILE, F32), ROW)


def _lengths(cfg, smem):
    """1 / length of each query and key, or 1."""
    for name, row in (("q", PER_Q), ("k", PER_K)):
        squares = no_rows()
        for n in range(slices(cfg)):
            part = load_tile(smem[name].at[n])
            squares += jnp.sum(part * part, axis=1)
        squares = squares + LENGTH_EPS if cfg.normalize else jnp.maximum(1.0, jnp.minimum(squares, 1.0))
        smem["lengths"][row] = lax.rsqrt(squares)


def _sum_decays(cfg, idx, ins, smem):
    """Sums of log2 decays up to each token of the chunk to "sums", and to its end."""
    b, chunk, head = idx

    def each(n, _):
        steps = ins["g"].at[b, pl.ds(chunk * TILE, TILE), head, pl.ds(n * TILE, TILE)]
        sums = threads.sums_upto(log2_decays(cfg, steps, smem["real"].at[0] if cfg.segments else None))
        totals = smem["totals"].at[n]
        threads.store_totals_upto(totals, sums)
        plgpu.commit_smem()
        threads.store_padded(smem["sums"].at[n], sums + threads.others["before"](totals))
        smem["ends"][n] = sum(vector(totals.at[w]) for w in range(TILE // threads.BLOCK))
        return None

    lax.fori_loop(0, slices(cfg), each, None)


def _level(cfg, bits, smem):
    """(A, B) of the pairs of a level, without lengths and beta."""

    def work(of_q, of_k):
        for n in range(slices(cfg)):
            weight = jnp.exp2(threads.distance(smem["sums"].at[n], bits))
            keys = weigh(smem["k"].at[n], weight, cfg.dtype)
            smem["keys"][n] = keys
            plgpu.commit_smem()
            plgpu.wgmma(of_q, weigh(smem["q"].at[n], weight, cfg.dtype), smem["keys"].at[n].T)
            plgpu.wgmma(of_k, keys, smem["keys"].at[n].T)
        return sums_of(of_q), sums_of(of_k)

    pairs = accumulate(work, TILE, TILE)
    plgpu.commit_smem()  # all have read the keys
    return [threads.keep_level(product, bits) for product in pairs]


def _pairs(cfg, smem):
    """(A, B diag(beta)) of the chunk."""

    def level(bits, found):
        return tuple(sums + more for sums, more in zip(found, _level(cfg, bits, smem), strict=True))

    asked, mixed = lax.fori_loop(0, threads.LEVELS, level, (zeros(TILE), zeros(TILE)))
    own = no_rows()
    for n in range(slices(cfg)):
        own += jnp.sum(load_tile(smem["q"].at[n]) * load_tile(smem["k"].at[n]), axis=1)
    asked += threads.keep_diagonal(rows_of(own))
    per_k = cols_of(vector(smem["lengths"].at[PER_K]))
    asked *= rows_of(vector(smem["lengths"].at[PER_Q], ROW) * cfg.scale)
    mixed *= rows_of(vector(smem["lengths"].at[PER_K], ROW))
    return asked * per_k, mixed * per_k * cols_of(vector(smem["beta"]))


def _weigh_all(cfg, smem):
    """from_q and from_k in place of q and k, to_state in place of the keys of a level."""
    per_q, per_k = vector(smem["lengths"].at[PER_Q], ROW) * cfg.scale, vector(smem["lengths"].at[PER_K], ROW)

    def each(n, _):
        q, k = smem["q"].at[n], smem["k"].at[n]
        sums = plgpu.load(smem["sums"].at[n, :, pl.ds(0, TILE)], layout=WGMMA, optimized=False)
        after = jnp.exp2(cols_of(vector(smem["ends"].at[n])) - sums)
        smem["keys"][n] = weigh(k, after * rows_of(per_k), cfg.dtype)
        upto = jnp.exp2(sums)
        q[...] = weigh(q, upto * rows_of(per_q), cfg.dtype)
        k[...] = weigh(k, upto * rows_of(per_k), cfg.dtype)
        return None

    lax.fori_loop(0, slices(cfg), each, None)


def _work(cfg, idx, ins, outs, smem, bar):
    b, chunk, head = idx
    group, rows = lax.div(head, cfg.heads // cfg.groups), pl.ds(chunk * TILE, TILE)
    for name in ("q", "k"):
        for n in range(slices(cfg)):
            source = ins[name].at[b, rows, group, pl.ds(n * TILE, TILE)]
            plgpu.copy_gmem_to_smem(source, smem[name].at[n], bar)
    plgpu.copy_gmem_to_smem(ins["beta"].at[b, chunk, head], smem["beta"], bar)
    if cfg.segments:
        plgpu.copy_gmem_to_smem(ins["real"].at[b, chunk], smem["real"].at[0], bar)
    plgpu.barrier_wait(bar)
    clear_padding(cfg, smem, 0, *(smem[name].at[n] for name in ("q", "k") for n in range(slices(cfg))))
    _sum_decays(cfg, idx, ins, smem)
    _lengths(cfg, smem)
    plgpu.commit_smem()
    asked, mixed = _pairs(cfg, smem)
    smem["a"][...] = asked.astype(cfg.dtype)
    _weigh_all(cfg, smem)
    plgpu.commit_smem()  # all have read the sums, in whose place the inverse works
    for name, source in (("from_q", "q"), ("from_k", "k"), ("to_state", "keys")):
        for n in range(slices(cfg)):
            plgpu.copy_smem_to_gmem(smem[source].at[n], outs[name].at[b, rows, head, pl.ds(n * TILE, TILE)])
    for name in ("a", "lengths"):
        plgpu.copy_smem_to_gmem(smem[name], outs[name].at[b, chunk, head])
    for n in range(slices(cfg)):
        plgpu.copy_smem_to_gmem(smem["ends"].at[n], outs["ends"].at[b, chunk, head, pl.ds(n * TILE, TILE)])
    inverse = ["t", "t_rest"] if cfg.exact else ["t"]
    scratch = [smem["scratch"].at[n] for n in range(SCRATCH)]
    unit_inverse(mixed, smem["t"], scratch, smem["t_rest"] if cfg.exact else None)
    plgpu.commit_smem()
    for name in inverse:
        plgpu.copy_smem_to_gmem(smem[name], outs[name].at[b, chunk, head])
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
        **({"t_rest": pairs} if cfg.exact else {}),
        "ends": numbers((cfg.batch, cfg.chunks, cfg.heads, cfg.key)),
        "lengths": numbers((cfg.batch, cfg.chunks, cfg.heads, 2, TILE)),
    }


def _scratch(cfg):
    tile = functools.partial(plgpu.SMEM, dtype=cfg.dtype, transforms=BF16_TRANSFORMS)
    return {
        **{name: tile((slices(cfg), TILE, TILE)) for name in ("q", "k", "keys")},
        "a": tile((TILE, TILE)),
        "t": tile((TILE, TILE)),
        "t_rest": tile((TILE, TILE)) if cfg.exact else None,
        "sums or scratch": plgpu.RefUnion(
            plgpu.SMEM((slices(cfg), TILE, threads.PADDED), F32), tile((SCRATCH, TILE, TILE))
        ),
        "totals": plgpu.SMEM((slices(cfg), TILE // threads.BLOCK, TILE), F32),
        "ends": plgpu.SMEM((slices(cfg), TILE), F32),
        "beta": plgpu.SMEM((TILE,), F32),
        "real": plgpu.SMEM((1, TILE), F32) if cfg.segments else None,
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

    pl.run_scoped(scoped, _scratch(cfg), plgpu.Barrier(num_arrivals=1 + 2 * slices(cfg) + cfg.segments))


@functools.partial(jax.jit, static_argnums=0)  # so that calls alike are traced and lowered once
def chunks(cfg, q, k, g, beta, real):
    """Its outputs by name, see `_outputs`.

    q, k ``[B, T, G, N]``, g ``[B, T, H, N]`` float32, beta ``[B, chunks, H, 64]``, real ``[B, chunks, 64]`` or None.
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
