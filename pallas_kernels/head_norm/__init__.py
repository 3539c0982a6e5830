# SPDX-License-Identifier: Apache-2.0
"""The RMS norm of heads and their rotation in one pass over memory, and its gradient in one, on a Hopper GPU.

`why_not` says where the kernels can serve. They stand in a module that is imported where it is called, for Mosaic takes
its time. Axis letters: R rows, H heads, P head width, C pairs of a head that are rotated.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import platform
from pallas_kernels.op import why_not_hopper

__all__ = [
    "COSTS",
    "head_norm",
    "head_norm_gradients",
    "heads_at_once",
    "make_plan",
    "tile_rows",
    "why_not",
    "why_not_heads",
]

OLDEST_JAX = (0, 11)
THREADS, VECTOR = 128, 4
"""Of a thread block; neighbours of a head that a thread has, of each half."""
WIDTHS = (64, 128)
"""Of a head."""
TILE, MOST = 4096, 16384
"""Bytes of a tile of bfloat16: as many, or more where all threads have a part of no less; and the most."""
SHARED, OWN = 220 * 1024, 4096
"""Bytes of shared memory of a multiprocessor for thread blocks, and of them what each has beside its tiles: weights,
what sums over warps take, barriers and the system's."""
BLOCKS = {"head_norm": 6, "head_norm_gradients": 4}
"""Thread blocks of a multiprocessor, at most: for more there are no registers."""
COSTS = dict.fromkeys(BLOCKS, "pallas_kernels.cost:no_products")
"""As `gpu_costs` of an op."""


def why_not(n_rows: int, n_heads: int, width: int, dtype: DTypeLike) -> str | None:
    """Why the kernels cannot serve arrays [n_rows, n_heads, width] of a type; None where they can."""
    if reason := why_not_heads(width, dtype):
        return reason
    rows = tile_rows(n_heads, width)
    if 2 * rows * n_heads * width > MOST:
        return f"heads ({n_heads}), of which {rows} rows are taken at a time, are more than {MOST} bytes"
    return f"rows ({n_rows}) no multiple of {rows}" if n_rows % rows else None


def why_not_heads(width: int, dtype: DTypeLike) -> str | None:
    """Why no kernel of `pallas_kernels.heads` can serve heads of this width and type; None where one can."""
    if reason := why_not_hopper(OLDEST_JAX):
        return reason
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"arrays are of type {jnp.dtype(dtype)}, not bfloat16"
    return None if width in WIDTHS else f"head width ({width}) not one of {', '.join(map(str, WIDTHS))}"


def head_norm(
    x_RHP: jax.Array,
    weight_P: jax.Array,
    turn_RcC: jax.Array | None,
    eps: float,
    factor: float = 1.0,
    n_heads: int | None = None,
) -> jax.Array:
    """x / rms(x) * weight * factor of each head, then rotated; in float32, rounded once, to bfloat16.

    x: [R, H, P] bfloat16; weight: [P] float32. turn: [R, 2, C] float32, cosines and sines of each row's angles, by
    which pairs (i, i + C) of whole heads are turned (C: half of P); None: not rotated. n_heads: so many of x, the
    first, are what is normed, and all of the result; None: all.
    NotImplementedError where `why_not` gives a reason.
    """
    from pallas_kernels.head_norm import kernel

    plan = _plan("head_norm", [x_RHP], turn_RcC, eps, factor, n_heads)
    return kernel.head_norm(plan, x_RHP, weight_P, turn_RcC)


def head_norm_gradients(
    x_RHP: jax.Array,
    weight_P: jax.Array,
    turn_RcC: jax.Array | None,
    dy_RHP: jax.Array,
    eps: float,
    factor: float = 1.0,
    n_heads: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(dx, [R, H, P] bfloat16, d_weight, [P] float32) of `head_norm`, whose cotangent is dy, bfloat16 or float32.

    n_heads: of the first so many, as there; dy, bfloat16, has all, and dx is dy, written to, in the others: as if they
    were handed on as they are.
    NotImplementedError where `why_not` gives a reason, ValueError for a cotangent of another shape or type.
    """
    types = [jnp.bfloat16] if _some(x_RHP, n_heads) else [jnp.bfloat16, jnp.float32]
    if dy_RHP.shape != x_RHP.shape or dy_RHP.dtype not in types:
        names = " or ".join(jnp.dtype(of).name for of in types)
        raise ValueError(f"dy_RHP ({dy_RHP.dtype}{list(dy_RHP.shape)}) must be {names}, {x_RHP.shape}")
    from pallas_kernels.head_norm import kernel

    plan = _plan("head_norm_gradients", [x_RHP, dy_RHP], turn_RcC, eps, factor, n_heads)
    return kernel.head_norm_gradients(plan, x_RHP, weight_P, turn_RcC, dy_RHP)


def _piece(n_heads: int, width: int) -> tuple[int, int, int]:
    """Rows, heads and pairs of which each thread has VECTOR of each half: as many heads as divide."""
    at_once = heads_at_once(width)
    side_by_side = math.gcd(n_heads, at_once)
    return at_once // side_by_side, side_by_side, width // 2


def heads_at_once(width: int) -> int:
    """Heads, of one row or several, of which each thread of a block has VECTOR neighbours of each half."""
    return THREADS * VECTOR // (width // 2)


def tile_rows(n_heads: int, width: int) -> int:
    """Rows of a tile."""
    least = _piece(n_heads, width)[0]
    return least * max(1, TILE // (2 * least * n_heads * width))


def _some(x_RHP: jax.Array, n_heads: int | None) -> bool:
    """Whether it has more heads than these."""
    return n_heads is not None and n_heads != x_RHP.shape[1]


def _plan(name: str, arrays_RHP: list[jax.Array], turn_RcC: jax.Array | None, eps: float, factor: float, n_heads):
    x_RHP = arrays_RHP[0]
    apart, (n_rows, all_heads, width) = not _some(x_RHP, n_heads), x_RHP.shape
    n_heads = all_heads if n_heads is None else n_heads
    if not 0 < n_heads <= all_heads:
        raise ValueError(f"n_heads ({n_heads}) not from 1 to those of x_RHP ({all_heads})")
    if reason := why_not(n_rows, n_heads, width, x_RHP.dtype):
        raise NotImplementedError(reason)
    of_turn = 0 if turn_RcC is None else 4 * width
    plan = make_plan(arrays_RHP, n_heads, 1, eps, BLOCKS[name], of_turn=of_turn)
    return plan._replace(factor=factor, apart=apart)


def make_plan(
    arrays_RHP: Sequence[jax.Array], n_heads: int, n_written: int, eps: float, most_blocks: int, *, stages: int = 3,
    of_turn: int = 0,
):  # fmt: skip
    """`pallas_kernels.heads.Plan` of the first n_heads of arrays [R, H, P] that are read, of n_written more like the
    first, of no more thread blocks than most_blocks of a multiprocessor; of_turn: bytes a row of what is read beside
    them."""
    from pallas_kernels.heads import Plan

    n_rows, _, width = arrays_RHP[0].shape
    tile, row = tile_rows(n_heads, width), n_heads * width
    read, written = row * sum(a.dtype.itemsize for a in arrays_RHP), row * arrays_RHP[0].dtype.itemsize * n_written
    n_bytes = tile * (stages * (read + of_turn) + 2 * written) + OWN
    side_by_side = max(1, min(most_blocks, SHARED // n_bytes))
    n_blocks = min(n_rows // tile, side_by_side * platform.multiprocessors())
    return Plan(n_rows, n_heads, width, eps, 1.0, _piece(n_heads, width), tile, n_blocks, stages)
