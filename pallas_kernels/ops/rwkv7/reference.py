# SPDX-License-Identifier: Apache-2.0
"""The recurrence of `rwkv7`, token by token: the oracle of the others (float64 if the inputs are)."""

import jax.numpy as jnp

from pallas_kernels.by_token import scan_tokens


def rwkv7_reference(
    r_BTHN,
    g_BTHN,
    k_BTHN,
    v_BTHP,
    a_BTHN,
    b_BTHN,
    *,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
):
    """See `pallas_kernels.rwkv7`; `chunk` has no meaning here."""
    del chunk
    args = (r_BTHN, g_BTHN, k_BTHN, v_BTHP, a_BTHN, b_BTHN)
    dtype = jnp.result_type(*args, jnp.float32)
    n_batch, _, n_heads, d_head = v_BTHP.shape
    if initial_state is None:
        initial_state = jnp.zeros((n_batch, n_heads, k_BTHN.shape[-1], d_head), dtype)

    def step(state_BHNP, token):
        r_BHN, g_BHN, k_BHN, v_BHP, a_BHN, b_BHN = token
        removed_BHP = jnp.einsum("bhnp,bhn->bhp", state_BHNP, a_BHN)
        state_BHNP = jnp.exp(g_BHN)[..., None] * state_BHNP
        state_BHNP += jnp.einsum("bhn,bhp->bhnp", b_BHN, removed_BHP) + jnp.einsum("bhn,bhp->bhnp", k_BHN, v_BHP)
        return state_BHNP, jnp.einsum("bhnp,bhn->bhp", state_BHNP, r_BHN)

    tokens = tuple(array.astype(dtype) for array in args)
    y_BTHP, final_state_BHNP = scan_tokens(step, initial_state.astype(dtype), tokens, segment_ids)
    y_BTHP = y_BTHP.astype(v_BTHP.dtype)
    return (y_BTHP, final_state_BHNP) if return_final_state else y_BTHP
