# SPDX-License-Identifier: Apache-2.0
"""`cache_write` as XLA's scatter, which writes in place where the array's layout keeps width along lanes."""

import jax.numpy as jnp


def cache_write_xla(array, slots_BT, value_BTKP, *, layer=None):
    """See `pallas_kernels.cache_write`."""
    rows_B1 = jnp.arange(slots_BT.shape[0])[:, None]
    index = (rows_B1, slots_BT) if layer is None else (layer, rows_B1, slots_BT)
    return array.at[index].set(value_BTKP, mode="drop", wrap_negative_indices=False)
