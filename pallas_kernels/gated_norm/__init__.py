# SPDX-License-Identifier: Apache-2.0
"""The gradient of a gated RMS norm in one pass over memory, on a Hopper GPU.

`why_not` says where the kernel can serve. It stands in a module that is imported where it is called, for Mosaic takes
its time. Axis letters: R rows, C channels, N thread blocks.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.cost import Array
from pallas_kernels.op import why_not_hopper

__all__ = ["COSTS", "count_flops", "gated_norm_gradients", "why_not"]

OLDEST_JAX = (0, 11)
LEAST, MOST, MULTIPLE = 512, 4096, 256
"""Channels: below, what one pass saves is not worth another kernel to compile; above, a row's do not fit registers."""
COSTS = {"gated_norm_gradients": "pallas_kernels.gated_norm:count_flops"}
"""As `gpu_costs` of an op."""


def why_not(n_rows: int, n_channels: int, dtype: DTypeLike) -> str | None:
    """Why the kernel cannot serve arrays [n_rows, n_channels] of a type; None where it can."""
    if reason := why_not_hopper(OLDEST_JAX):
        return reason
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"arrays are of type {jnp.dtype(dtype)}, not bfloat16"
    if not LEAST <= n_channels <= MOST or n_channels % MULTIPLE:
        return f"channels ({n_channels}) below {LEAST}, above {MOST} or no multiple of {MULTIPLE}"
    return None


def gated_norm_gradients(y_RC, z_RC, weight_C, d_out_RC, eps: float, before_gate: bool) -> tuple[jax.Array, ...]:
    """(dy, dz, both [R, C] bfloat16, d_weight, [C] float32) of norm(y * silu(z)) * weight, or norm(y) * weight *
    silu(z) with `before_gate`, the norm over C, everything in float32.

    y, z, d_out: [R, C] bfloat16; weight: float32. NotImplementedError where `why_not` gives a reason.
    """
    n_rows, n_channels = y_RC.shape
    if reason := next(filter(None, (why_not(n_rows, n_channels, a.dtype) for a in (y_RC, z_RC, d_out_RC))), None):
        raise NotImplementedError(reason)
    from pallas_kernels.gated_norm import kernel

    return kernel.gated_norm_gradients(eps, before_gate, y_RC, z_RC, weight_C, d_out_RC)


def count_flops(operands: list[Array], results: list[Array]) -> float:
    """Of the matrix unit: none."""
    return 0.0
