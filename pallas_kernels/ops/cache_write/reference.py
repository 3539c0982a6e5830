# SPDX-License-Identifier: Apache-2.0
"""`cache_write` token by token, each compared with every slot: slow, obvious, the oracle (float64 if inputs are)."""

import jax.numpy as jnp


def cache_write_reference(array, slots_BT, value_BTKP, *, layer=None):
    """See `pallas_kernels.cache_write`."""
    stack = array[None] if layer is None else array
    mine_L = jnp.arange(stack.shape[0]) == (0 if layer is None else layer)
    for t in range(slots_BT.shape[1]):
        chosen_BS = jnp.arange(stack.shape[2])[None] == slots_BT[:, t, None]
        chosen = mine_L[:, None, None, None, None] & chosen_BS[None, :, :, None, None]
        stack = jnp.where(chosen, value_BTKP[None, :, t, None], stack)
    return stack[0] if layer is None else stack
