# SPDX-License-Identifier: Apache-2.0
"""A gated RMS norm and its gradient in one pass over memory each, on a Hopper GPU.

`why_not` says where the kernels can serve. They stand in a module that is imported where it is called, for Mosaic takes
its time. Axis letters: R rows, C channels.
"""

import jax
from jax.typing import DTypeLike

from pallas_kernels.rms_norm import why_not_rows

__all__ = ["COSTS", "gated_norm", "gated_norm_gradients", "why_not"]

LEAST = 512
"""Channels: below, what one pass saves is not worth another kernel to compile."""
COSTS = dict.fromkeys(("gated_norm", "gated_norm_gradients"), "pallas_kernels.cost:no_products")
"""As `gpu_costs` of an op."""


def why_not(n_channels: int, dtype: DTypeLike) -> str | None:
    """Why the kernels cannot serve arrays [..., n_channels] of a type; None where it can."""
    return why_not_rows(n_channels, dtype, LEAST)


def gated_norm(y_RC, z_RC, weight_C, eps: float, before_gate: bool) -> jax.Array:
    """norm(y * silu(z)) * weight, or norm(y) * weight * silu(z) with `before_gate`, [R, C] bfloat16; the norm over C,
    everything in float32.

    y, z: [R, C] bfloat16; weight: float32. NotImplementedError where `why_not` gives a reason.
    """
    if reason := next(filter(None, (why_not(a.shape[1], a.dtype) for a in (y_RC, z_RC))), None):
        raise NotImplementedError(reason)
    from pallas_kernels.gated_norm import kernel

    return kernel.gated_norm(eps, before_gate, y_RC, z_RC, weight_C)


def gated_norm_gradients(y_RC, z_RC, weight_C, d_out_RC, eps: float, before_gate: bool) -> tuple[jax.Array, ...]:
    """(dy, dz, both [R, C] bfloat16, d_weight, [C] float32) of norm(y * silu(z)) * weight, or norm(y) * weight *
    silu(z) with `before_gate`, the norm over C, everything in float32.

    y, z, d_out: [R, C] bfloat16; weight: float32. NotImplementedError where `why_not` gives a reason.
    """
    if reason := next(filter(None, (why_not(a.shape[1], a.dtype) for a in (y_RC, z_RC, d_out_RC))), None):
        raise NotImplementedError(reason)
    from pallas_kernels.gated_norm import kernel

    return kernel.gated_norm_gradients(eps, before_gate, y_RC, z_RC, weight_C, d_out_RC)
