# SPDX-License-Identifier: Apache-2.0
"""Exponentials of rows of numbers and their sums, in one pass over memory, on a Hopper GPU: of a chunk of logits this
is all that a cross entropy and its gradient ask for.

`why_not` says where the kernel can serve. It stands in a module that is imported where it is called, for Mosaic takes
its time. Axis letters: R rows, V columns.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.cost import Array
from pallas_kernels.op import why_not_hopper

__all__ = ["COSTS", "count_flops", "exponentials", "why_not"]

OLDEST_JAX = (0, 11)
ROWS = 4
"""Rows of a thread block, which walks along all of their columns."""
COLUMNS = 256
"""Columns of one copy; the least that there may be."""
ALIGNED = 8
"""Columns are a multiple of it: rows start at multiples of 16 bytes."""
COSTS = {"exponentials": "pallas_kernels.exponentials:count_flops"}
"""As `gpu_costs` of an op."""


def why_not(n_rows: int, n_columns: int, dtype: DTypeLike) -> str | None:
    """Why the kernel cannot serve rows [n_rows, n_columns] whose exponentials are of a type; None where it can."""
    if reason := why_not_hopper(OLDEST_JAX):
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


def count_flops(operands: list[Array], results: list[Array]) -> float:
    """Of the matrix unit: none."""
    return 0.0
