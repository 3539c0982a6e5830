# SPDX-License-Identifier: Apache-2.0
"""`grouped_dot` by megablox, the Pallas TPU kernel that JAX ships, forward and backward."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.ops.grouped_dot.xla import in_groups
from pallas_kernels.varying import call_varying

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
    n_rows, d_in = x_MK.shape
    x_MK, real_M1 = in_groups(x_MK, sizes_G)
    padded_MK = jnp.pad(x_MK, ((0, -n_rows % _ROWS), (0, 0)))
    tiling = (_ROWS, _tile(d_in), _tile(w_GKN.shape[2]))
    y_MN = _product(padded_MK, w_GKN, sizes_G, tiling, interpret)
    return jnp.where(real_M1, y_MN[:n_rows], 0)


# megablox' own gradient does not say over which axes of a checked shard_map its results vary.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x_MK, w_GKN, sizes_G, tiling: tuple, interpret: bool):
    return call_varying(functools.partial(_megablox, tiling, interpret), x_MK, w_GKN, sizes_G)


def _product_forward(x_MK, w_GKN, sizes_G, tiling: tuple, interpret: bool):
    return _product(x_MK, w_GKN, sizes_G, tiling, interpret), (x_MK, w_GKN, sizes_G)


def _product_backward(tiling: tuple, interpret: bool, saved, dy_MN):
    def pull(x_MK, w_GKN, sizes_G, dy_MN):  # the product itself, which nobody asks for, is not computed
        return jax.vjp(lambda x, w: _megablox(tiling, interpret, x, w, sizes_G), x_MK, w_GKN)[1](dy_MN)

    return *call_varying(pull, *saved, dy_MN), None


_product.defvjp(_product_forward, _product_backward)


def _megablox(tiling: tuple, interpret: bool, x_MK, w_GKN, sizes_G):
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    return gmm(x_MK, w_GKN, sizes_G, x_MK.dtype, tiling, interpret=interpret)


def _tile(width: int) -> int:
    return next(size for size in (512, 256, 128) if width % size == 0)
