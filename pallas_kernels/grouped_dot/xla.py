# SPDX-License-Identifier: Apache-2.0
"""`grouped_dot` by jax.lax.ragged_dot.

On TPU that is an instruction of XLA's. On CPU JAX multiplies every row with every matrix and masks, and so it does on
GPU unless `jax_ragged_dot_use_gpu_pallas_triton_lowering` is set: right, but G times the work and the memory.
"""

import jax
import jax.numpy as jnp


def grouped_dot_xla(x_MK, w_GKN, sizes_G):
    """See `pallas_kernels.grouped_dot`."""
    x_MK, real_M1 = in_groups(x_MK, sizes_G)
    dtype = jnp.promote_types(x_MK.dtype, jnp.float32)
    y_MN = jax.lax.ragged_dot(x_MK, w_GKN, sizes_G, preferred_element_type=dtype)
    return jnp.where(real_M1, y_MN, 0).astype(x_MK.dtype)


def in_groups(x_MK, sizes_G):
    """The rows, those behind all groups zeroed, and [M, 1] bool: which are in a group."""
    real_M1 = jnp.arange(x_MK.shape[0])[:, None] < sizes_G.sum()
    return jnp.where(real_M1, x_MK, 0), real_M1
