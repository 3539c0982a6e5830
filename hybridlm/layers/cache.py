# SPDX-License-Identifier: Apache-2.0
"""Reading and writing a layer's share of a cache.

A mixer alone owns arrays [B, ...]; a scanned model stacks those of its repeats, [L, B, ...], and names the layer, so
that a write touches the layer's own entries only and the stacked array is updated in place.
"""

import jax
import jax.numpy as jnp

from hybridlm import sharding
from pallas_kernels import cache_write


def read(array: jax.Array, layer: jax.Array | None) -> jax.Array:
    """The layer's entries; all where `layer` is None."""
    return array if layer is None else jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)


def write(array: jax.Array, layer: jax.Array | None, value: jax.Array) -> jax.Array:
    """`array` with the layer's entries replaced."""
    value = value.astype(array.dtype)
    return value if layer is None else jax.lax.dynamic_update_index_in_dim(array, value, layer, 0)


def read_all(cache: dict[str, jax.Array], layer: jax.Array | None) -> dict[str, jax.Array]:
    """`read` of every array."""
    return {name: read(array, layer) for name, array in cache.items()}


def write_all(cache: dict[str, jax.Array], layer: jax.Array | None, new: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`write` of every array."""
    return {name: write(cache[name], layer, new[name]) for name in cache}


def unless_padding(
    real_BT: jax.Array | None, new: dict[str, jax.Array], old: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The new arrays [B, ...] of rows whose one token is real, of others the old ones. real_BT: None: all real."""
    if real_BT is None:
        return new
    return {name: jnp.where(real_BT.reshape(-1, *(1,) * (a.ndim - 1)), a, old[name]) for name, a in new.items()}


def write_slots(array: jax.Array, layer: jax.Array | None, slots_BT: jax.Array, value_BT: jax.Array) -> jax.Array:
    """`array` [(L,) B, S, K, P] with value[b, t] at [b, slots[b, t]] of the layer; slots outside it are not written."""
    rows = ("batch", None, "kv_heads")
    names = (rows if layer is None else (None, *rows)), (), ("batch",), rows

    def write(array, layer, slots_BT, value_BT):
        return cache_write(array, slots_BT, value_BT, layer=layer)

    return sharding.per_device(write, (array, layer, slots_BT, value_BT), names, names[0])
