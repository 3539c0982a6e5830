# SPDX-License-Identifier: Apache-2.0
"""The gradient of silu(gate) * up, of both in one array, in one pass over memory, on a Hopper GPU.

`why_not` says where the kernel can serve. It stands in a module that is imported where it is called, for Mosaic takes
its time. Axis letters: R rows, F width.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import platform
from pallas_kernels.op import why_not_hopper

__all__ = ["COSTS", "gated_product_gradients", "why_not"]

OLDEST_JAX = (0, 11)
ROWS, COLUMNS = 16, 128
"""Of a tile."""
BLOCKS = 4
"""Thread blocks of a multiprocessor."""
COSTS = {"gated_product_gradients": "pallas_kernels.cost:no_products"}
"""As `gpu_costs` of an op."""


def why_not(n_rows: int, width: int, dtype: DTypeLike) -> str | None:
    """Why the kernel cannot serve arrays [n_rows, 2, width] of a type; None where it can."""
    if reason := why_not_hopper(OLDEST_JAX):
        return reason
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"arrays are of type {jnp.dtype(dtype)}, not bfloat16"
    if n_rows % ROWS or width % COLUMNS:
        return f"rows ({n_rows}) no multiple of {ROWS} or width ({width}) none of {COLUMNS}"
    return None


def gated_product_gradients(h_RcF: jax.Array, d_RF: jax.Array) -> jax.Array:
    """The gradient of h, [R, 2, F] bfloat16, of silu(h[:, 0]) * h[:, 1] whose cotangent is d; computed in float32.

    h: [R, 2, F], d: [R, F], both bfloat16. NotImplementedError where `why_not` gives a reason.
    """
    n_rows, _, width = h_RcF.shape
    if reason := next(filter(None, (why_not(n_rows, width, a.dtype) for a in (h_RcF, d_RF))), None):
        raise NotImplementedError(reason)
    from pallas_kernels.gated_product import kernel

    n_blocks = min(n_rows // ROWS * (width // COLUMNS), BLOCKS * platform.multiprocessors())
    plan = kernel.Plan(n_rows, width, (ROWS, COLUMNS), n_blocks)
    return kernel.gated_product_gradients(plan, h_RcF, d_RF)
