# SPDX-License-Identifier: Apache-2.0
"""The gradient of an RMS norm, and what else its input gets, in one pass over memory, on a Hopper GPU.

`why_not` says where the kernel can serve. It stands in a module that is imported where it is called, for Mosaic takes
its time. Axis letters: R rows, C channels.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.cost import Array
from pallas_kernels.op import why_not_hopper

__all__ = ["COSTS", "count_flops", "norm_gradients", "why_not"]

OLDEST_JAX = (0, 11)
LEAST, MOST, MULTIPLE = 256, 4096, 256
"""Channels: above, a row's do not fit registers."""
ROWS = 4
"""Of which there must be a multiple."""
COSTS = {"norm_gradients": "pallas_kernels.stream_norm:count_flops"}
"""As `gpu_costs` of an op."""


def why_not(n_rows: int, n_channels: int, dtype: DTypeLike) -> str | None:
    """Why the kernel cannot serve arrays [n_rows, n_channels] of a type; None where it can."""
    if reason := why_not_hopper(OLDEST_JAX):
        return reason
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"arrays are of type {jnp.dtype(dtype)}, not bfloat16"
    if n_rows % ROWS:
        return f"rows ({n_rows}) no multiple of {ROWS}"
    if not LEAST <= n_channels <= MOST or n_channels % MULTIPLE:
        return f"channels ({n_channels}) below {LEAST}, above {MOST} or no multiple of {MULTIPLE}"
    return None


def norm_gradients(x_RC, weight_C, d_normed_RC, d_x_RC, eps: float) -> tuple[jax.Array, jax.Array]:
    """(d_x + the gradient of x, [R, C] bfloat16, that of the weight, [C] float32) of x / rms(x) * weight over C,
    everything in float32.

    x, d_normed, d_x: [R, C] bfloat16; weight: float32. NotImplementedError where `why_not` gives a reason.
    """
    n_rows, n_channels = x_RC.shape
    arrays = x_RC, d_normed_RC, d_x_RC
    if reason := next(filter(None, (why_not(n_rows, n_channels, a.dtype) for a in arrays)), None):
        raise NotImplementedError(reason)
    from pallas_kernels.stream_norm import kernel

    dx_RC, dw_C = kernel.norm_gradients(eps, x_RC, weight_C, d_normed_RC, d_x_RC)
    return dx_RC, dw_C


def count_flops(operands: list[Array], results: list[Array]) -> float:
    """Of the matrix unit: none."""
    return 0.0
