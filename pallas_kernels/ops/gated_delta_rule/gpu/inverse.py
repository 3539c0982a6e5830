# SPDX-License-Identifier: Apache-2.0
"""The inverse of a unit lower triangle of 64 tokens, within a Hopper kernel, in float32 accuracy.

Blocks of 16 on the diagonal by forward substitution, a block a warp; from there by halves, as
`pallas_kernels.chunks.unit_inverse`: the inverse of two blocks and what stands below them is that of each, and one
product on either side. No power of the triangle is taken, whose entries may be large where those of the inverse are
not. Products are on the matrix unit, of two bfloat16 terms (16 bits) of each operand.
"""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import TILE, accumulate, sums_of
from pallas_kernels.ops.gated_delta_rule.gpu import threads

SCRATCH = 5


def unit_inverse(below, target, scratch, rest=None) -> None:
    """Writes (1 + below)^-1 to `target`, a bfloat16 tile; `below` a strictly lower float32 triangle in registers.

    `rest` is such a tile for what its rounding took, or None.

    `scratch` are SCRATCH more such tiles. What is written is to be committed by the caller.

    A product reads the rows of its left operand by the warp that wrote them, and those of its right one by all: so
    between a product and the next write of its right operand stands the commit of another one's operands. Operands are
    in shared memory: as registers they leave ptxas too few (C7511).
    """
    factor, whole, between = scratch[:2], scratch[2:4], (target, scratch[4])
    _store(factor, below)
    inverse = threads.invert_blocks(below)
    for keep in threads.keep_between.values():
        _store(whole, inverse)
        plgpu.commit_smem()
        product = _product(factor, whole)  # by blocks on the diagonal, so that what is to be kept is kept afterwards
        _store(between, keep(product))
        plgpu.commit_smem()
        inverse -= _product(whole, between)
    plgpu.commit_smem()  # all have read `target`
    if rest is None:
        target[...] = inverse.astype(jnp.bfloat16)
    else:
        _store((target, rest), inverse)


def _store(tiles, array) -> None:
    for tile, term in zip(tiles, threads.two_terms(array), strict=True):
        tile[...] = term


def _product(left, right):
    """left @ right, pairs of tiles."""

    def work(acc):
        plgpu.wgmma(acc, left[1], right[0])
        plgpu.wgmma(acc, left[0], right[1])
        plgpu.wgmma(acc, left[0], right[0])
        return sums_of(acc)

    return accumulate(work, TILE)
