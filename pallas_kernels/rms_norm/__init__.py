# SPDX-License-Identifier: Apache-2.0
"""The gradient of an RMS norm of a residual stream in one pass over memory, on a Hopper GPU.

What reaches the norm from each product that reads it, and what reaches its input beside it, are added where they are
read. `why_not` says where the kernel can serve. It stands in a module that is imported where it is called, for Mosaic
takes its time. Axis letters: R rows, C channels.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.op import why_not_hopper

__all__ = ["COSTS", "MOST_GRADIENTS", "rms_norm_gradients", "why_not", "why_not_rows"]

OLDEST_JAX = (0, 11)
LEAST, MOST, MULTIPLE = 256, 4096, 256
"""Channels: below, what one pass saves is not worth another kernel to compile; above, a row's do not fit registers."""
MOST_GRADIENTS = 4
"""Of the norm's result."""
COSTS = {"rms_norm_gradients": "pallas_kernels.cost:no_products"}
"""As `gpu_costs` of an op."""


def why_not(n_channels: int, dtype: DTypeLike) -> str | None:
    """Why the kernel cannot serve arrays [..., n_channels] of a type; None where it can."""
    return why_not_rows(n_channels, dtype, LEAST)


def why_not_rows(n_channels: int, dtype: DTypeLike, least: int) -> str | None:
    """The same of any kernel of `pallas_kernels.rows`, which is for no less than `least` channels."""
    if reason := why_not_hopper(OLDEST_JAX):
        return reason
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"arrays are of type {jnp.dtype(dtype)}, not bfloat16"
    if not least <= n_channels <= MOST or n_channels % MULTIPLE:
        return f"channels ({n_channels}) below {least}, above {MOST} or no multiple of {MULTIPLE}"
    return None


def rms_norm_gradients(
    x_RC: jax.Array, weight_C: jax.Array, grads_RC: Sequence[jax.Array], beside_RC: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """(dx, [R, C] bfloat16, d_weight, [C] float32) of x / rms(x) * weight, the norm over C, everything in float32.

    x: [R, C] bfloat16; weight: float32. grads: cotangents of the result, one to MOST_GRADIENTS of them, whose sum
    counts; beside: what dx is added to, before it is rounded; bfloat16 like x.
    NotImplementedError where `why_not` gives a reason, ValueError for another number of cotangents.
    """
    n_channels = x_RC.shape[1]
    if not 1 <= len(grads_RC) <= MOST_GRADIENTS:
        raise ValueError(f"grads_RC ({len(grads_RC)} arrays) must be 1 to {MOST_GRADIENTS}")
    reasons = (why_not(n_channels, a.dtype) for a in (x_RC, *grads_RC, beside_RC))
    if reason := next(filter(None, reasons), None):
        raise NotImplementedError(reason)
    from pallas_kernels.rms_norm import kernel

    return kernel.rms_norm_gradients(eps, x_RC, weight_C, beside_RC, *grads_RC)
