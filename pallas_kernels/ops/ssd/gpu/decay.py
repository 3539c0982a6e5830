# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel for the per-token decay vectors that all SSD kernels read.

With ``a`` the cumulative sum of ``dt A log2(e)`` within chunks of 64 tokens it writes ``a`` and ``a - log2(dt)``. The
sums are products with a triangle of ones: dt is cut into three bfloat16 terms, whose sum is dt in float32 accuracy.

Documents are a matter of decay alone: the first token of one takes ``BETWEEN_DOCUMENTS`` more from ``a``, so that
every weight across a document's start is 0 and no other kernel knows of documents. Padding has dt = 0.
"""

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
    LOG2E,
    PARAMS,
    ROW,
    TILE,
    WGMMA,
    accumulate,
    cols_of,
    load_tile,
    named_body,
    rows_of,
    tile_index,
)
from pallas_kernels.varying import call_varying

HEADS = 64  # of a thread block
SMALLEST_DT_EXPONENT = 64.0
SMALLEST_DT = 2.0**-SMALLEST_DT_EXPONENT  # a smaller dt counts as this in gradients
# Minus the log2 of the decay between two documents: below 2^-126 float32 is 0 on the device, up to a dt of 2^17. Small,
# because it rounds the decays behind it in the chunk.
BETWEEN_DOCUMENTS = 144.0
MOST_PAIRS = 2**23  # tokens times chunks up to which one pass over all of them is cheaper than two


def _sums(v, ones_s):
    """``v @ ones`` ``[64, 64]``, in float32 accuracy by three bfloat16 terms of v."""
    terms = []
    for _ in range(3):
        terms.append(v.astype(jnp.bfloat16))
        v = v - terms[-1].astype(F32)

    def work(acc):
        for term in reversed(terms):
            plgpu.wgmma(acc, term, ones_s)
        return acc[...]

    return accumulate(work, TILE)


def _documents(ids_s, carried, vector_s):
    """(documents that begin in the chunk up to each token as a column vector, padding as ``document_vectors`` has it).

    ``carried`` is the id of the last real token before the chunk, 0 without one. ``vector_s`` is scratch.
    """
    row = tile_index(0)
    col = tile_index(1)
    ids, ids_col = plgpu.load(ids_s, layout=ROW, optimized=False), plgpu.load(ids_s, layout=COL)
    real = cols_of(ids_col, TILE) != 0
    index = col.astype(F32)
    before = jnp.where(col < row, jnp.where(real, index, -1.0), -1.0)  # [token, earlier real one]
    alike = jnp.where(cols_of(ids_col, TILE) == rows_of(ids, TILE), before, -1.0)
    last, last_alike = jnp.max(before, axis=1), jnp.max(alike, axis=1)
    carried_in = jnp.where(ids != carried, 1.0, 0.0) * jnp.where(carried != 0, 1.0, 0.0)
    first = jnp.where(last < 0.0, carried_in, jnp.where(last_alike < last, 1.0, 0.0))
    vector_s[...] = jnp.where(ids != 0, first, 0.0)
    plgpu.commit_smem()
    begun = jnp.where(col <= row, cols_of(plgpu.load(vector_s, layout=COL), TILE), 0.0)
    begun = jnp.sum(begun, axis=1)
    count = jnp.sum(jnp.where(real, 1.0, 0.0), axis=1)
    plgpu.commit_smem()  # all have read
    vector_s[...] = begun
    plgpu.commit_smem()
    padding = jnp.where(count >= float(TILE), 2.0, jnp.where(ids != 0, 1.0, 0.0))
    return plgpu.load(vector_s, layout=COL), padding


def _decays_body(segments, *refs):
    dt_g, head_g, *ids_g = refs[: 2 + 2 * segments]
    ab_g, *real_g = refs[2 + 2 * segments :]
    b, chunk, h0 = lax.axis_index("batch"), lax.axis_index("chunk"), lax.axis_index("heads") * HEADS

    def scoped(dt_s, rate_s, ids_s, vector_s, real_s, ones_s, a_s, b_s, bar):
        rows = pl.ds(chunk * TILE, TILE)
        plgpu.copy_gmem_to_smem(dt_g.at[b, rows, pl.ds(h0, HEADS)], dt_s, bar.at[0])
        plgpu.copy_gmem_to_smem(head_g.at[pl.ds(h0, HEADS)], rate_s, bar.at[0])
        if segments:
            plgpu.copy_gmem_to_smem(ids_g[0].at[b, rows], ids_s, bar.at[0])
        row = tile_index(0)
        col = tile_index(1)
        ones_s[...] = jnp.where(row <= col, 1.0, 0.0).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_wait(bar.at[0])
        dt = plgpu.load(dt_s.T, layout=WGMMA, optimized=False)
        if segments:
            before = ids_g[1][b, chunk]
            carried = jnp.where(before >= 0, ids_g[0][b, jnp.maximum(before, 0)], 0)
            begun, real = _documents(ids_s, carried, vector_s)
            real_s[...] = real
            dt = jnp.where(cols_of(plgpu.load(ids_s, layout=COL), HEADS) != 0, dt, 0.0)
        rate = rows_of(plgpu.load(rate_s, layout=ROW) * LOG2E, TILE)
        a = _sums(dt, ones_s) * rate
        if segments:
            a -= cols_of(begun * BETWEEN_DOCUMENTS, HEADS)
        a_s[...] = a
        b_s[...] = a - jnp.log2(dt)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(a_s, ab_g.at[b, chunk, pl.ds(h0, HEADS), 0])
        plgpu.copy_smem_to_gmem(b_s, ab_g.at[b, chunk, pl.ds(h0, HEADS), 1])
        if segments:  # the blocks of all heads write the same
            plgpu.copy_smem_to_gmem(real_s, real_g[0].at[b, chunk])
        plgpu.wait_smem_to_gmem(0)

    f32 = functools.partial(plgpu.SMEM, dtype=F32)
    vector = f32((TILE,)) if segments else None
    pl.run_scoped(
        scoped,
        f32((TILE, HEADS), transforms=F32_TRANSFORMS),
        f32((HEADS,)),
        plgpu.SMEM((TILE,), jnp.int32) if segments else None,
        vector,
        vector,
        plgpu.SMEM((TILE, TILE), jnp.bfloat16, transforms=BF16_TRANSFORMS),
        f32((HEADS, TILE), transforms=F32_TRANSFORMS),
        f32((HEADS, TILE), transforms=F32_TRANSFORMS),
        plgpu.Barrier(num_arrivals=2 + segments, num_barriers=1),
    )


def last_real_before(ids, chunks):
    """Index of the last real token before each chunk, -1 without one: ``[B, chunks]`` int32."""
    batch, tokens = ids.shape
    index = jnp.where(ids != 0, jnp.arange(tokens, dtype=jnp.int32), -1)
    if chunks * tokens > MOST_PAIRS:
        index = jnp.pad(index, ((0, 0), (0, chunks * TILE - tokens)), constant_values=-1)
        index = index.reshape(batch, chunks, TILE).max(-1)
        token = jnp.arange(chunks, dtype=jnp.int32) * TILE
    else:
        token = jnp.arange(tokens, dtype=jnp.int32)
    begin = jnp.arange(chunks, dtype=jnp.int32)[:, None] * TILE
    return jnp.where(token[None] < begin, index[:, None], -1).max(-1)


@functools.partial(jax.jit, static_argnums=3)  # so that calls alike are traced and lowered once
def decays(dt, a, ids, chunks):
    """Decays ``[B, chunks, H, 2, 64]`` and padding ``[B, chunks, 64]`` (None without ids) of the tokens.

    From dt ``[B, T, H]`` float32 (H a multiple of 64), A ``[H]`` and segment ids ``[B, T]`` or None. Tokens behind T
    and padding count as dt = 0; their second value is infinite. Padding is told as by ``gpu.document_vectors``.
    """
    batch, _, heads = dt.shape
    out = [jax.ShapeDtypeStruct((batch, chunks, heads, 2, TILE), F32)]
    args = [dt, a]
    if ids is not None:
        out.append(jax.ShapeDtypeStruct((batch, chunks, TILE), F32))
        args += [ids, last_real_before(ids, chunks)]
    kernel = plgpu.kernel(
        named_body("ssd_decays", _decays_body, ids is not None),
        out_type=out,
        grid=(batch, chunks, heads // HEADS),
        grid_names=("batch", "chunk", "heads"),
        compiler_params=PARAMS,
    )
    ab, *real = call_varying(kernel, *args)
    return ab, (real[0] if real else None)


def _gradients_body(segments, has_d, *refs):
    source_g, target_g, cross_g, state_g, dt_g, head_g, *rest = refs
    ids_g = rest.pop(0) if segments else None
    ddt_g, da_g, *dd_g = rest
    b, span, h0 = lax.axis_index("batch"), lax.axis_index("span"), lax.axis_index("heads") * HEADS
    heads = pl.ds(h0, HEADS)

    def scoped(parts_s, dt_s, cross_s, state_s, rate_s, ids_s, sums_s, ones_s, bar):
        for half in range(2):
            chunk, rows = span * 2 + half, pl.ds((span * 2 + half) * TILE, TILE)
            for part in range(2 + has_d):
                plgpu.copy_gmem_to_smem(source_g.at[b, chunk, heads, part], parts_s.at[half, part], bar.at[0])
            plgpu.copy_gmem_to_smem(target_g.at[b, chunk, heads], parts_s.at[half, 2 + has_d], bar.at[0])
            plgpu.copy_gmem_to_smem(dt_g.at[b, rows, heads], dt_s.at[half], bar.at[0])
            if segments:
                plgpu.copy_gmem_to_smem(ids_g.at[b, rows], ids_s.at[half], bar.at[0])
        plgpu.copy_gmem_to_smem(cross_g.at[b, span, heads], cross_s, bar.at[0])
        plgpu.copy_gmem_to_smem(state_g.at[b, span, heads], state_s, bar.at[0])
        plgpu.copy_gmem_to_smem(head_g.at[heads], rate_s, bar.at[0])
        row = tile_index(0)
        col = tile_index(1)
        ones_s[...] = jnp.where(row >= col, 1.0, 0.0).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_wait(bar.at[0])

        later = jnp.sum(load_tile(parts_s.at[0, 1]) + load_tile(parts_s.at[1, 1]) + load_tile(state_s), axis=1)
        rate = rows_of(plgpu.load(rate_s, layout=ROW), TILE)
        d_a = jnp.zeros_like(later)
        for half in (1, 0):
            x_v = load_tile(parts_s.at[half, 0])
            net = load_tile(parts_s.at[half, 2 + has_d]) - x_v
            if half:
                net += load_tile(cross_s)
            log_decay = _sums(net, ones_s) + rows_of(later, TILE)
            if half:
                later += jnp.sum(net, axis=1)
            dt = plgpu.load(dt_s.at[half].T, layout=WGMMA, optimized=False)
            d_dt = x_v / jnp.maximum(dt, SMALLEST_DT) + rate * log_decay
            if segments:
                real = cols_of(plgpu.load(ids_s.at[half], layout=COL), HEADS) != 0
                d_dt, dt = jnp.where(real, d_dt, 0.0), jnp.where(real, dt, 0.0)
            d_a += jnp.sum(dt * log_decay, axis=1)
            parts_s[half, 2 + has_d] = d_dt  # read by the same threads before
        sums_s[0] = d_a
        if has_d:
            sums_s[1] = jnp.sum(load_tile(parts_s.at[0, 2]) + load_tile(parts_s.at[1, 2]), axis=1)
        plgpu.commit_smem()
        for half in range(2):
            dt_s[half] = plgpu.load(parts_s.at[half, 2 + has_d].T, layout=WGMMA, optimized=False)
        plgpu.commit_smem()
        for half in range(2):
            rows = pl.ds((span * 2 + half) * TILE, TILE)
            plgpu.copy_smem_to_gmem(dt_s.at[half], ddt_g.at[b, rows, heads])
        plgpu.copy_smem_to_gmem(sums_s.at[0], da_g.at[b, span, heads])
        if has_d:
            plgpu.copy_smem_to_gmem(sums_s.at[1], dd_g[0].at[b, span, heads])
        plgpu.wait_smem_to_gmem(0)

    f32 = functools.partial(plgpu.SMEM, dtype=F32)
    tile = functools.partial(f32, transforms=F32_TRANSFORMS)
    pl.run_scoped(
        scoped,
        tile((2, 3 + has_d, HEADS, TILE)),
        tile((2, TILE, HEADS)),
        tile((HEADS, TILE)),
        tile((HEADS, TILE)),
        f32((HEADS,)),
        plgpu.SMEM((2, TILE), jnp.int32) if segments else None,
        f32((2, HEADS)),
        plgpu.SMEM((TILE, TILE), jnp.bfloat16, transforms=BF16_TRANSFORMS),
        plgpu.Barrier(num_arrivals=2 * (4 + has_d + segments) + 3, num_barriers=1),
    )


@functools.partial(jax.jit, static_argnums=7)
def gradients(source, target, cross, state, dt, a, ids, has_d):
    """Gradients of dt ``[B, T, H]``, of A and (None without ``has_d``) of D ``[H]`` from the sums of ``gpu_grads``.

    source ``[B, chunks, H, 2 or 3, 64]``, target ``[B, chunks, H, 64]``, cross and state ``[B, chunks / 2, H, 64]``; H
    a multiple of 64. The log decay of token t acts on all pairs j < t <= i: its gradient is the sum of
    ``dy . y - x . v`` over tokens i >= t of the span, plus what reaches the span's end. Documents that begin behind t
    cancel in it.
    """
    batch, _, heads = dt.shape
    spans = cross.shape[1]
    partial = jax.ShapeDtypeStruct((batch, spans, heads), F32)
    kernel = plgpu.kernel(
        named_body("ssd_decay_gradients", _gradients_body, ids is not None, has_d),
        out_type=[jax.ShapeDtypeStruct(dt.shape, F32), partial] + [partial] * has_d,
        grid=(batch, spans, heads // HEADS),
        grid_names=("batch", "span", "heads"),
        compiler_params=PARAMS,
    )
    d_dt, *sums = call_varying(kernel, source, target, cross, state, dt, a, *([] if ids is None else [ids]))
    sums = [v.sum((0, 1)) for v in sums]
    return d_dt, sums[0], (sums[1] if has_d else None)
