# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel for the per-token decay vectors that all SSD kernels read.

With ``a`` the cumulative sum of ``dt A log2(e)`` within chunks of 64 tokens it writes ``a`` and ``a - log2(dt)``. The
sums are products with a triangle of ones: dt is cut into three bfloat16 terms, whose sum is dt in float32 accuracy.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssd.gpu_walk import BF16_TRANSFORMS, COL, ROW, TILE

WGMMA = plgpu.Layout.WGMMA
F32_TRANSFORMS = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
LOG2E = math.log2(math.e)
HEADS = 64  # of a thread block


def _body(segments, *refs):
    dt_g, head_g, *seg_g, ab_g = refs
    b, chunk, h0 = lax.axis_index("batch"), lax.axis_index("chunk"), lax.axis_index("heads") * HEADS

    def scoped(dt_s, rate_s, seg_s, ones_s, a_s, b_s, bar):
        tile = (b, pl.ds(chunk * TILE, TILE), pl.ds(h0, HEADS))
        plgpu.copy_gmem_to_smem(dt_g.at[tile], dt_s, bar.at[0])
        plgpu.copy_gmem_to_smem(head_g.at[pl.ds(h0, HEADS)], rate_s, bar.at[0])
        if segments:
            plgpu.copy_gmem_to_smem(seg_g[0].at[b, chunk], seg_s, bar.at[0])
        rows = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 0, layout=WGMMA)
        cols = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=WGMMA)
        ones_s[...] = jnp.where(rows <= cols, 1.0, 0.0).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_wait(bar.at[0])
        dt = plgpu.load(dt_s.T, layout=WGMMA, optimized=False)
        if segments:
            span = plgpu.load(seg_s.at[0], layout=COL)
            dt = jnp.where(lax.broadcast_in_dim(span, (HEADS, TILE), (1,)) >= 0.0, dt, 0.0)
        rest, terms = dt, []
        for _ in range(3):
            terms.append(rest.astype(jnp.bfloat16))
            rest = rest - terms[-1].astype(jnp.float32)

        def sums(acc):
            for term in reversed(terms):
                plgpu.wgmma(acc, term, ones_s)
            return acc[...]

        rate = lax.broadcast_in_dim(plgpu.load(rate_s, layout=ROW) * LOG2E, (HEADS, TILE), (0,))
        a = pl.run_scoped(sums, plgpu.ACC((HEADS, TILE), jnp.float32)) * rate
        a_s[...] = a
        b_s[...] = a - jnp.log2(dt)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(a_s, ab_g.at[b, chunk, pl.ds(h0, HEADS), 0])
        plgpu.copy_smem_to_gmem(b_s, ab_g.at[b, chunk, pl.ds(h0, HEADS), 1])
        plgpu.wait_smem_to_gmem(0)

    f32 = functools.partial(plgpu.SMEM, dtype=jnp.float32)
    pl.run_scoped(
        scoped,
        f32((TILE, HEADS), transforms=F32_TRANSFORMS),
        f32((HEADS,)),
        f32((4, TILE)) if segments else None,
        plgpu.SMEM((TILE, TILE), jnp.bfloat16, transforms=BF16_TRANSFORMS),
        f32((HEADS, TILE), transforms=F32_TRANSFORMS),
        f32((HEADS, TILE), transforms=F32_TRANSFORMS),
        plgpu.Barrier(num_arrivals=2 + segments, num_barriers=1),
    )


def decays(dt, a, seg, chunks):
    """``[B, chunks, H, 2, 64]`` from dt ``[B, T, H]`` float32 (H a multiple of 64), A ``[H]`` and seg or None.

    Tokens behind T and, by seg's visible span, padding count as dt = 0; their second value is infinite.
    """
    batch, _, heads = dt.shape
    kernel = plgpu.kernel(
        functools.partial(_body, seg is not None),
        out_type=jax.ShapeDtypeStruct((batch, chunks, heads, 2, TILE), jnp.float32),
        grid=(batch, chunks, heads // HEADS),
        grid_names=("batch", "chunk", "heads"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return kernel(dt, a, *([] if seg is None else [seg]))
