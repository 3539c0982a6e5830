# SPDX-License-Identifier: Apache-2.0
"""`grouped_dot` on Hopper: the kernels of `kernels.py`, forward and backward, and the lists of work that they read."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.ops.grouped_dot.gpu import kernels
from pallas_kernels.ops.grouped_dot.gpu.kernels import COPIED, ROWS, Product

WIDTH_MULTIPLE = 128  # of inputs and outputs: rows of a tile of the matrices' gradients
ROW_MULTIPLE = COPIED
MARGIN = 0  # rows behind: blocks may reach beyond the rows, where the copy engine reads zeros and writes nothing
FEWEST_ROWS = 16  # a group, of calls that `auto` serves: fewer, as in generation, were not measured and stay with xla


def supports(x_MK, w_GKN, sizes_G) -> str | None:
    """Why the kernels cannot serve the call, or None."""
    if x_MK.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x_MK has dtype {x_MK.dtype}, not bfloat16 or float16"
    if x_MK.shape[1] % WIDTH_MULTIPLE or w_GKN.shape[2] % WIDTH_MULTIPLE:
        sizes = f"inputs ({x_MK.shape[1]}) and outputs ({w_GKN.shape[2]})"
        return f"{sizes} of w_GKN are not multiples of {WIDTH_MULTIPLE}"
    return None


def slower(x_MK, w_GKN, sizes_G) -> str | None:
    """Why xla is faster at the call, or None."""
    share = x_MK.shape[0] // w_GKN.shape[0]
    return f"{share} rows a group, fewer than {FEWEST_ROWS}" if share < FEWEST_ROWS else None


def grouped_dot_gpu(x_MK, w_GKN, sizes_G):
    """See `pallas_kernels.grouped_dot`."""
    n_rows = x_MK.shape[0]
    x_MK = jnp.pad(x_MK, ((0, -n_rows % ROW_MULTIPLE + MARGIN), (0, 0)))
    return _product(x_MK, w_GKN, sizes_G)[:n_rows]


@jax.custom_vjp
def _product(x_MK, w_GKN, sizes_G):
    return _rows_times_matrices(x_MK, w_GKN, sizes_G, transposed=False)


def _product_forward(x_MK, w_GKN, sizes_G):
    return _product(x_MK, w_GKN, sizes_G), (x_MK, w_GKN, sizes_G)


def _product_backward(saved, dy_MN):
    x_MK, w_GKN, sizes_G = saved
    dx_MK = _rows_times_matrices(dy_MN, w_GKN, sizes_G, transposed=True)
    cfg = _describe(x_MK, w_GKN, transposed=False)
    return dx_MK, _matrix_gradients(cfg, x_MK, dy_MN, _largest_first(sizes_G)), None


_product.defvjp(_product_forward, _product_backward)


def _describe(x_MK, w_GKN, transposed: bool) -> Product:
    n_groups, *widths = w_GKN.shape
    inputs, outputs = widths[::-1] if transposed else widths
    return Product(
        rows=x_MK.shape[0],
        inputs=inputs,
        outputs=outputs,
        groups=n_groups,
        multiprocessors=platform.multiprocessors(),
        transposed=transposed,
        dtype=jnp.dtype(x_MK.dtype),
    )


def _rows_times_matrices(x_MK, w_GKN, sizes_G, transposed: bool):
    cfg = _describe(x_MK, w_GKN, transposed)
    return _rows_kernel(cfg, x_MK, w_GKN, *_visits(sizes_G, cfg.n_rows))


# One call after the other under vmap; lowered once for all calls of a program alike.


@functools.partial(jax.jit, static_argnums=0)
def _rows_kernel(cfg: Product, *arrays):
    return jax.custom_batching.sequential_vmap(functools.partial(kernels.rows_times_matrices, cfg))(*arrays)


@functools.partial(jax.jit, static_argnums=0)
def _matrix_gradients(cfg: Product, *arrays):
    return jax.custom_batching.sequential_vmap(functools.partial(kernels.matrix_gradients, cfg))(*arrays)


def _visits(sizes_G, n_tiles: int):
    """(tiles, groups) of `kernels.rows_times_matrices`."""
    ends_G = jnp.cumsum(sizes_G)
    order_G = jnp.argsort(sizes_G == 0, stable=True)
    groups_G3 = jnp.stack([jnp.arange(sizes_G.shape[0]), ends_G - sizes_G, ends_G], axis=1)[order_G]
    some_G = sizes_G[order_G] > 0
    tile_T = jnp.arange(n_tiles)
    before = groups_G3[None, :, 2] <= tile_T[:, None] * ROWS
    begun = groups_G3[None, :, 1] < (tile_T[:, None] + 1) * ROWS
    first_T, until_T = (jnp.sum(seen & some_G[None], axis=1) for seen in (before, begun))
    tiles_T3 = jnp.stack([tile_T, first_T, until_T - first_T], axis=1)
    order_T = jnp.argsort(first_T - until_T, stable=True)
    return tiles_T3[order_T].astype(jnp.int32), groups_G3.astype(jnp.int32)


def _largest_first(sizes_G):
    """groups of `kernels.matrix_gradients`."""
    ends_G = jnp.cumsum(sizes_G)
    starts_G = ends_G - sizes_G
    begins_G = jnp.where(sizes_G > 0, starts_G // COPIED * COPIED, ends_G)
    groups_G4 = jnp.stack([jnp.arange(sizes_G.shape[0]), begins_G, starts_G, ends_G], axis=1)
    return groups_G4[jnp.argsort(-sizes_G, stable=True)].astype(jnp.int32)
