# SPDX-License-Identifier: Apache-2.0
"""`grouped_dot` by megablox, the Pallas TPU kernel that JAX ships, forward and backward."""

import jax.numpy as jnp

from pallas_kernels.ops.grouped_dot.xla import in_groups

_ROWS = 128  # rows of a tile: M is padded to a multiple


def supports(x_MK, w_GKN, sizes_G) -> str | None:
    """Why the kernel cannot serve the call, or None."""
    if x_MK.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x_MK has dtype {x_MK.dtype}, not bfloat16 or float32"
    if x_MK.shape[1] % 128 or w_GKN.shape[2] % 128:
        return f"inputs ({x_MK.shape[1]}) and outputs ({w_GKN.shape[2]}) of w_GKN are not multiples of 128"
    return None


def grouped_dot_tpu(x_MK, w_GKN, sizes_G, *, interpret: bool = False):
    """See `pallas_kernels.grouped_dot`."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    n_rows, d_in = x_MK.shape
    x_MK, real_M1 = in_groups(x_MK, sizes_G)
    padded_MK = jnp.pad(x_MK, ((0, -n_rows % _ROWS), (0, 0)))
    tiling = (_ROWS, _tile(d_in), _tile(w_GKN.shape[2]))
    y_MN = gmm(padded_MK, w_GKN, sizes_G, x_MK.dtype, tiling, interpret=interpret)
    return jnp.where(real_M1, y_MN[:n_rows], 0)


def _tile(width: int) -> int:
    return next(size for size in (512, 256, 128) if width % size == 0)
