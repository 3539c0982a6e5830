# SPDX-License-Identifier: Apache-2.0
"""silu(gate) * up, of both in one array, on a Hopper GPU: its gradient in one pass over memory, and both of them
where the matrix products beside them are made.

`why_not` and `why_not_products` say where the kernels can serve. They stand in modules that are imported where they are
called, for Mosaic takes its time. Axis letters: R rows, D inputs, F width.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import op, platform
from pallas_kernels.cost import Array

__all__ = ["COSTS", "gated_product_gradients", "gated_products", "hidden_gradients", "why_not", "why_not_products"]

OLDEST_JAX = (0, 11)
ROWS, COLUMNS = 16, 128
"""Of a tile."""
BLOCKS = 4
"""Thread blocks of a multiprocessor."""
OF_PRODUCTS = 256, 64, 128
"""What rows, inputs and width are multiples of, where products are made."""
LEAST_WIDTH = 256
COSTS = {
    "gated_product_gradients": "pallas_kernels.cost:no_products",
    "gated_products": "pallas_kernels.gated_product:count_product_flops",
    "hidden_gradients": "pallas_kernels.gated_product:count_gradient_flops",
}
"""As `gpu_costs` of an op."""


def why_not(n_rows: int, width: int, dtype: DTypeLike) -> str | None:
    """Why the kernel cannot serve arrays [n_rows, 2, width] of a type; None where it can."""
    if reason := op.why_not_hopper(OLDEST_JAX):
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


def why_not_products(n_rows: int, n_inputs: int, width: int, dtype: DTypeLike) -> str | None:
    """Why `gated_products` and `hidden_gradients` cannot serve rows [n_rows, n_inputs] beside [n_rows, 2, width] of a
    type; None where they can."""
    sizes = {"rows": n_rows, "inputs": n_inputs, "width": width}
    if reason := op.why_not_products(OLDEST_JAX, dtype, sizes, OF_PRODUCTS):
        return reason
    return f"width ({width}) below {LEAST_WIDTH}" if width < LEAST_WIDTH else None


def gated_products(x_RD: jax.Array, w_DcF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(h [R, 2, F], hidden [R, F]): h = x @ w, summed in float32, and silu(h[:, 0]) * h[:, 1] of the rounded h.

    x: [R, D], w: [D, 2, F], all bfloat16. It has no gradient. NotImplementedError where `why_not_products` gives a
    reason.
    """
    (n_rows, n_inputs), width = x_RD.shape, w_DcF.shape[2]
    _require_products(n_rows, n_inputs, width, x_RD, w_DcF)
    from pallas_kernels.gated_product import products

    plan = products.plan_for(n_rows, n_inputs, width, platform.multiprocessors())
    return products.gated_products(plan, x_RD, w_DcF)


def hidden_gradients(dy_RD: jax.Array, w_FD: jax.Array, h_RcF: jax.Array) -> jax.Array:
    """The gradient of h, [R, 2, F], of (silu(h[:, 0]) * h[:, 1]) @ w whose cotangent is dy; computed in float32.

    dy: [R, D], w: [F, D], h: [R, 2, F], all bfloat16. The hidden's cotangent, dy @ w.T, is not stored.
    NotImplementedError where `why_not_products` gives a reason.
    """
    (n_rows, n_inputs), width = dy_RD.shape, len(w_FD)
    _require_products(n_rows, n_inputs, width, dy_RD, w_FD, h_RcF)
    from pallas_kernels.gated_product import products

    plan = products.plan_for(n_rows, n_inputs, width, platform.multiprocessors())
    return products.hidden_gradients(plan, dy_RD, w_FD, h_RcF)


def _require_products(n_rows: int, n_inputs: int, width: int, *arrays: jax.Array) -> None:
    for array in arrays:
        if reason := why_not_products(n_rows, n_inputs, width, array.dtype):
            raise NotImplementedError(reason)


def count_product_flops(operands: list[Array], results: list[Array]) -> float:
    """Of the matrix unit, of `gated_products`."""
    (rows, inputs), (_, parts, width) = operands[0].shape, operands[1].shape
    return 2.0 * rows * inputs * parts * width


def count_gradient_flops(operands: list[Array], results: list[Array]) -> float:
    """Of the matrix unit, of `hidden_gradients`."""
    (rows, inputs), (width, _) = operands[0].shape, operands[1].shape
    return 2.0 * rows * inputs * width
