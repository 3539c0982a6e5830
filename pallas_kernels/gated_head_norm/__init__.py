# SPDX-License-Identifier: Apache-2.0
"""The RMS norm of heads times a gate in one pass over memory, and its gradient in one, on a Hopper GPU.

`why_not` says where the kernels can serve. They stand in a module that is imported where it is called, for Mosaic takes
its time. Axis letters: R rows, each a head of a token, P head width.
"""

import jax
from jax.typing import DTypeLike

from pallas_kernels.head_norm import heads_at_once, make_plan, tile_rows, why_not_heads

__all__ = ["COSTS", "GATES", "gated_head_norm", "gated_head_norm_gradients", "why_not"]

GATES = ("silu", "sigmoid")
BLOCKS = {"gated_head_norm": 6, "gated_head_norm_gradients": 4}
"""Thread blocks of a multiprocessor, at most: for more there are no registers."""
STAGES = {"gated_head_norm": 3, "gated_head_norm_gradients": 2}
"""Slots of the ring: of the gradient as many as leave room for the thread blocks."""
COSTS = dict.fromkeys(BLOCKS, "pallas_kernels.cost:no_products")
"""As `gpu_costs` of an op."""


def why_not(n_rows: int, width: int, dtype: DTypeLike) -> str | None:
    """Why the kernels cannot serve arrays [n_rows, width] of a type; None where they can."""
    if reason := why_not_heads(width, dtype):
        return reason
    at_once = heads_at_once(width)
    multiple = tile_rows(at_once, width) * at_once
    return f"rows ({n_rows}) no multiple of {multiple}" if n_rows % multiple else None


def gated_head_norm(y_RP: jax.Array, z_RP: jax.Array, weight_P: jax.Array, eps: float, gating: str) -> jax.Array:
    """y / rms(y) * weight * gate(z), the norm over P; in float32, rounded once, to bfloat16.

    y, z: [R, P] bfloat16; weight: [P] float32; gating: one of GATES.
    NotImplementedError where `why_not` gives a reason, ValueError for another gate or shapes that are not alike.
    """
    from pallas_kernels.gated_head_norm import kernel

    plan, arrays_RHP = _planned("gated_head_norm", (y_RP, z_RP), gating, eps)
    return kernel.gated_head_norm(plan, gating, weight_P, *arrays_RHP).reshape(y_RP.shape)


def gated_head_norm_gradients(
    y_RP: jax.Array, z_RP: jax.Array, weight_P: jax.Array, d_RP: jax.Array, eps: float, gating: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dy, dz, both [R, P] bfloat16, d_weight, [P] float32) of `gated_head_norm`, whose cotangent is d, bfloat16.

    Errors as there.
    """
    from pallas_kernels.gated_head_norm import kernel

    plan, arrays_RHP = _planned("gated_head_norm_gradients", (y_RP, z_RP, d_RP), gating, eps)
    dy, dz, d_weight = kernel.gated_head_norm_gradients(plan, gating, weight_P, *arrays_RHP)
    return dy.reshape(y_RP.shape), dz.reshape(z_RP.shape), d_weight


def _planned(name: str, arrays_RP: tuple[jax.Array, ...], gating: str, eps: float):
    """(The kernel's plan, its arrays by so many heads as it has at once.)"""
    if gating not in GATES:
        raise ValueError(f"gating ({gating!r}) not one of {', '.join(GATES)}")
    n_rows, width = arrays_RP[0].shape
    if any(a.shape != (n_rows, width) for a in arrays_RP):
        raise ValueError(f"arrays ({[a.shape for a in arrays_RP]}) not of one shape")
    if reason := next(filter(None, (why_not(n_rows, width, a.dtype) for a in arrays_RP)), None):
        raise NotImplementedError(reason)
    n_heads = heads_at_once(width)
    arrays_RHP = [a.reshape(-1, n_heads, width) for a in arrays_RP]
    written = len(arrays_RP) - 1
    return make_plan(arrays_RHP, n_heads, written, eps, BLOCKS[name], stages=STAGES[name]), arrays_RHP
