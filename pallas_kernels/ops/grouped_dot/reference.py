# SPDX-License-Identifier: Apache-2.0
"""`grouped_dot` as one masked product a group: slow, obvious, the oracle (float64 if the inputs are)."""

import jax.numpy as jnp


def grouped_dot_reference(x_MK, w_GKN, sizes_G):
    """See `pallas_kernels.grouped_dot`."""
    dtype = jnp.promote_types(x_MK.dtype, jnp.float32)
    row_M, ends_G = jnp.arange(x_MK.shape[0]), jnp.cumsum(sizes_G)
    y_MN = jnp.zeros((x_MK.shape[0], w_GKN.shape[2]), dtype)
    for group in range(w_GKN.shape[0]):
        mine_M = (row_M >= ends_G[group] - sizes_G[group]) & (row_M < ends_G[group])
        rows_MK = jnp.where(mine_M[:, None], x_MK.astype(dtype), 0)
        y_MN += jnp.dot(rows_MK, w_GKN[group].astype(dtype))
    return y_MN.astype(x_MK.dtype)
