# SPDX-License-Identifier: Apache-2.0
"""`grouped_dot` by jax.lax.ragged_dot on TPU, where that is an instruction of XLA's, and block by block elsewhere.

Off TPU, JAX's ragged_dot multiplies every row with every group's matrix and masks: G times the work, and G copies of
the rows. Here a loop takes blocks of rows of one group each, as many as there are rows for, in the forward and in the
hand-written backward pass; its only waste is in the last block of each group. The loop's length is known at run time
alone, so that there, unlike on TPU, the product can be differentiated once and not twice.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.varying import vary_alike

_LARGEST = 512  # rows of a block
_BLOCKS = 4  # blocks of a group of mean size: more of them waste less and read the matrices more often


def grouped_dot_xla(x_MK, w_GKN, sizes_G):
    """See `pallas_kernels.grouped_dot`."""
    if platform.platform() != "tpu":
        return _blocked(x_MK, w_GKN, sizes_G)
    x_MK, real_M1 = in_groups(x_MK, sizes_G)
    y_MN = jax.lax.ragged_dot(x_MK, w_GKN, sizes_G, preferred_element_type=_accumulator(x_MK))
    return jnp.where(real_M1, y_MN, 0).astype(x_MK.dtype)


def in_groups(x_MK, sizes_G):
    """The rows, those behind all groups zeroed, and [M, 1] bool: which are in a group."""
    real_M1 = jnp.arange(x_MK.shape[0])[:, None] < sizes_G.sum()
    return jnp.where(real_M1, x_MK, 0), real_M1


def _accumulator(array):
    return jnp.promote_types(array.dtype, jnp.float32)


@jax.custom_vjp
def _blocked(x_MK, w_GKN, sizes_G):
    return _products(x_MK, w_GKN, sizes_G, 0)


def _blocked_forward(x_MK, w_GKN, sizes_G):
    return _products(x_MK, w_GKN, sizes_G, 0), (x_MK, w_GKN, sizes_G)


def _blocked_backward(saved, dy_MN):
    x_MK, w_GKN, sizes_G = saved
    return _products(dy_MN, w_GKN, sizes_G, 1), _outer_products(x_MK, dy_MN, sizes_G).astype(w_GKN.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _products(x_MK, w_GKN, sizes_G, contract: int):
    """Rows times their group's matrix, whose axis `contract` meets them."""
    n_rows, block = x_MK.shape[0], _block_rows(x_MK, sizes_G)
    x_MK, n_out = jnp.pad(x_MK, ((0, block), (0, 0))), w_GKN.shape[2 - contract]

    def step(index, y_MN):
        group, start, is_own = _block(index, sizes_G, block)
        rows = jax.lax.dynamic_slice_in_dim(x_MK, start, block)
        w = jax.lax.dynamic_index_in_dim(w_GKN, group, keepdims=False)
        y = jnp.tensordot(rows, w, (1, contract), preferred_element_type=_accumulator(x_MK))
        old = jax.lax.dynamic_slice_in_dim(y_MN, start, block)
        return jax.lax.dynamic_update_slice_in_dim(y_MN, jnp.where(is_own, y.astype(old.dtype), old), start, 0)

    empty, _ = vary_alike((jnp.zeros((n_rows + block, n_out), x_MK.dtype), x_MK))
    return jax.lax.fori_loop(0, _count(sizes_G, block), step, empty)[:n_rows]


def _outer_products(x_MK, dy_MN, sizes_G):
    """[G, K, N] of each group's rows: the sum of x[i] dy[i]^T."""
    block, dtype = _block_rows(x_MK, sizes_G), _accumulator(x_MK)
    x_MK, dy_MN = (jnp.pad(array, ((0, block), (0, 0))) for array in (x_MK, dy_MN))

    def step(index, dw_GKN):
        group, start, is_own = _block(index, sizes_G, block)
        x, dy = (jnp.where(is_own, jax.lax.dynamic_slice_in_dim(a, start, block), 0) for a in (x_MK, dy_MN))
        return dw_GKN.at[group].add(jnp.tensordot(x, dy, (0, 0), preferred_element_type=dtype))

    empty, _ = vary_alike((jnp.zeros((sizes_G.shape[0], x_MK.shape[1], dy_MN.shape[1]), dtype), x_MK))
    return jax.lax.fori_loop(0, _count(sizes_G, block), step, empty)


def _block_rows(x_MK, sizes_G) -> int:
    """Rows of a block: a power of two."""
    share = x_MK.shape[0] / (_BLOCKS * sizes_G.shape[0])
    return min(_LARGEST, max(8, 2 ** math.ceil(math.log2(max(1, share)))))


def _count(sizes_G, block: int):
    return jnp.sum(_blocks_of(sizes_G, block))


def _blocks_of(sizes_G, block: int):
    return (sizes_G + block - 1) // block


def _block(index, sizes_G, block: int):
    """(group, first row, [block, 1] bool: which rows are the group's) of a block."""
    ends_G = jnp.cumsum(_blocks_of(sizes_G, block))
    group = jnp.sum(index >= ends_G)
    first = (index - ends_G[group] + _blocks_of(sizes_G, block)[group]) * block  # in the group
    start = jnp.cumsum(sizes_G)[group] - sizes_G[group] + first
    return group, start, (jnp.arange(block) < sizes_G[group] - first)[:, None]
