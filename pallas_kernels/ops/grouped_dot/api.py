# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix product: rows sorted by group, each group with a matrix of its own (Gale et al. 2023, MegaBlocks)."""

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_float, check_shape
from pallas_kernels.op import call
from pallas_kernels.ops.grouped_dot import OP


def grouped_dot(x_MK: jax.Array, w_GKN: jax.Array, sizes_G: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """y[i] = x[i] @ w[g] for the rows i of group g: the first sizes[0] rows are group 0's, the next sizes[1] group 1's.

    Args:
      x_MK: rows, bfloat16, float16, float32 or float64.
      w_GKN: a matrix a group, of the type of x.
      sizes_G: int32, rows of each group; their sum is at most M. Rows behind all groups give zeros and get zero
        gradients, whatever stands in them.
      implementation: "auto", "reference", "xla" (jax.lax.ragged_dot on TPU, a loop over blocks of rows elsewhere),
        "tpu" (the megablox kernel that JAX ships) or "gpu" (Hopper kernels, of 16-bit types and widths that are
        multiples of 128).

    Returns:
      y_MN in the dtype of x; sums are float32 at least. Gradients flow to x and w. Raises ValueError or TypeError for
      arguments that do not fit together, NotImplementedError where the named implementation cannot serve the call.
      Forward mode (jax.jvp) goes through reference alone; of xla its gradient can be differentiated so.
    """
    check_shape("x_MK", x_MK, (None, None), "rows, inputs")
    check_shape("w_GKN", w_GKN, (None, x_MK.shape[1], None), "groups, inputs of x_MK, outputs")
    check_shape("sizes_G", sizes_G, (w_GKN.shape[0],), "groups of w_GKN")
    check_float("x_MK", x_MK)
    if w_GKN.dtype != x_MK.dtype:
        raise TypeError(f"w_GKN has dtype {w_GKN.dtype}, expected that of x_MK ({x_MK.dtype})")
    if not jnp.issubdtype(sizes_G.dtype, jnp.integer):
        raise TypeError(f"sizes_G has dtype {sizes_G.dtype}, expected int32")
    args = (jnp.asarray(x_MK), jnp.asarray(w_GKN), jnp.asarray(sizes_G).astype(jnp.int32))
    return call(OP, implementation, args, {})
