# SPDX-License-Identifier: Apache-2.0
"""Exponentials of rows of numbers and their sums, in one pass over memory, on a Hopper GPU: of a chunk of logits this
is all that a cross entropy and its gradient ask for. Of products, they are made where those are: logits are not stored.

`why_not` and `why_not_products` say where the kernels can serve. They stand in modules that are imported where they are
called, for Mosaic takes its time. Axis letters: R rows, V columns, D the axis that products sum over.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import op, platform
from pallas_kernels.cost import Array

__all__ = ["COSTS", "exponentials", "product_exponentials", "why_not", "why_not_products"]

OLDEST_JAX = (0, 11)
ROWS = 4
"""Rows of a thread block, which walks along all of their columns."""
COLUMNS = 256
"""Columns of one copy; the least that there may be."""
ALIGNED = 8
"""Columns are a multiple of it: rows start at multiples of 16 bytes."""
OF_PRODUCTS = 256, 64, 64
"""What rows, the summed axis and columns are multiples of, where products are made."""
COSTS = {
    "exponentials": "pallas_kernels.cost:no_products",
    "product_exponentials": "pallas_kernels.exponentials:count_product_flops",
    "product_exponentials_again": "pallas_kernels.cost:no_products",
}
"""As `gpu_costs` of an op."""


def why_not(n_rows: int, n_columns: int, dtype: DTypeLike) -> str | None:
    """Why the kernel cannot serve rows [n_rows, n_columns] whose exponentials are of a type; None where it can."""
    if reason := op.why_not_hopper(OLDEST_JAX):
        return reason
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"exponentials are of type {jnp.dtype(dtype)}, not bfloat16"
    if n_rows % ROWS:
        return f"rows ({n_rows}) no multiple of {ROWS}"
    if n_columns < COLUMNS or n_columns % ALIGNED:
        return f"columns ({n_columns}) below {COLUMNS} or no multiple of {ALIGNED}"
    return None


def exponentials(z_RV: jax.Array, base_R: jax.Array, factor: float = 1.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """exp(factor * z - base) as bfloat16 [R, V], its sums before rounding, float32 [R], and the bases, float32 [R].

    z_RV, base_R: float32. factor: positive. A row's base is the one given, unless an exponential beside it would be so
    large that its sum might overflow: then it is the largest of factor * z. It has no gradient. NotImplementedError
    where `why_not` gives a reason.
    """
    n_rows, n_columns = z_RV.shape
    if reason := why_not(n_rows, n_columns, jnp.bfloat16):
        raise NotImplementedError(reason)
    from pallas_kernels.exponentials import kernel

    return kernel.exponentials(kernel.Plan(n_rows, n_columns, ROWS, COLUMNS, factor), z_RV, base_R)


def why_not_products(n_rows: int, n_inputs: int, n_columns: int, dtype: DTypeLike) -> str | None:
    """Why the kernel of products [n_rows, n_inputs] x [n_columns, n_inputs] of a type cannot serve; None where it
    can."""
    sizes = {"rows": n_rows, "summed axis": n_inputs, "columns": n_columns}
    if reason := op.why_not_products(OLDEST_JAX, dtype, sizes, OF_PRODUCTS):
        return reason
    return f"columns ({n_columns}) below {COLUMNS}" if n_columns < COLUMNS else None


def product_exponentials(
    x_RD: jax.Array, w_VD: jax.Array, base_R: jax.Array, factor: float = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`exponentials` of x @ w.T, which is summed in float32 and not stored.

    x, w: bfloat16; base: float32. NotImplementedError where `why_not_products` gives a reason.
    """
    (n_rows, n_inputs), n_columns = x_RD.shape, len(w_VD)
    if reason := next(
        filter(None, (why_not_products(n_rows, n_inputs, n_columns, a.dtype) for a in (x_RD, w_VD))), None
    ):
        raise NotImplementedError(reason)
    from pallas_kernels.exponentials import products

    plan = products.Plan(n_rows, n_inputs, n_columns, factor, platform.multiprocessors())
    return products.product_exponentials(plan, x_RD, w_VD, base_R)


def count_product_flops(operands: list[Array], results: list[Array]) -> float:
    """Of the matrix unit: the products."""
    (rows, inputs), columns = operands[0].shape, operands[1].shape[0]
    return 2.0 * rows * inputs * columns
