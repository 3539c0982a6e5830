# SPDX-License-Identifier: Apache-2.0
"""What the Hopper kernels of attention share: scores under a softcap, and which keys a query sees."""

import functools

import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import LOG2E, cols_of, rows_of, tile_index


def capped(scores, scale: float, softcap: float | None):
    """(scores in units of log2 as a function of q . k, tanh of the softcap or None).

    tanh through exp2: the hardware's own is off by 5e-4.
    """
    if softcap is None:
        return scores * (scale * LOG2E), None
    tanh = 1.0 - 2.0 / (1.0 + jnp.exp2(scores * (2.0 * LOG2E * scale / softcap)))
    return tanh * (softcap * LOG2E), tanh


def visible(cfg, base, bounds, keys, axis: int, shape):
    """[m, n] bool: which keys, along `axis`, the queries of the other one see.

    bounds: start, end (and id) of the queries, keys: their ids and positions where cfg has them, as vectors in the
    layouts that fit.
    """
    spread = (functools.partial(cols_of, m=shape[0]), functools.partial(rows_of, n=shape[1]))
    of_keys, of_queries = spread if axis == 1 else spread[::-1]
    keys = list(keys)
    ids = keys.pop(0) if cfg.ids else None
    position = of_keys(keys.pop(0)) if cfg.positions else tile_index(axis, shape) + base
    mask = jnp.logical_and(position >= of_queries(bounds[0]), position < of_queries(bounds[1]))
    return jnp.logical_and(mask, of_keys(ids) == of_queries(bounds[2])) if cfg.ids else mask
