# SPDX-License-Identifier: Apache-2.0
"""The recurrence of `gated_delta_rule`, token by token: the oracle of the others (float64 if the inputs are)."""

import jax.numpy as jnp

from pallas_kernels.by_token import scan_tokens


def gated_delta_rule_reference(
    q_BTGN,
    k_BTGN,
    v_BTHP,
    beta_BTH,
    g,
    *,
    normalize,
    scale,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
):
    """See `pallas_kernels.gated_delta_rule`; `chunk` has no meaning here."""
    del chunk
    dtype = jnp.result_type(q_BTGN, k_BTGN, v_BTHP, beta_BTH, jnp.float32)
    n_batch, _, n_heads, d_head = v_BTHP.shape
    if initial_state is None:
        initial_state = jnp.zeros((n_batch, n_heads, k_BTGN.shape[-1], d_head), dtype)
    g = jnp.zeros_like(beta_BTH) if g is None else g
    g = g[..., None] if g.ndim == 3 else g

    def heads(array_BGN):
        """Of each head: of unit length, if asked for."""
        if normalize:
            array_BGN = array_BGN / jnp.sqrt(jnp.sum(array_BGN**2, axis=-1, keepdims=True) + 1e-6)
        return jnp.repeat(array_BGN, n_heads // array_BGN.shape[1], axis=1)

    def step(state_BHNP, token):
        q_BGN, k_BGN, v_BHP, beta_BH, g_BHN = token
        q_BHN, k_BHN = scale * heads(q_BGN), heads(k_BGN)
        state_BHNP = jnp.exp(g_BHN)[..., None] * state_BHNP
        error_BHP = v_BHP - jnp.einsum("bhnp,bhn->bhp", state_BHNP, k_BHN)
        state_BHNP = state_BHNP + jnp.einsum("bhn,bhp->bhnp", k_BHN, beta_BH[..., None] * error_BHP)
        return state_BHNP, jnp.einsum("bhnp,bhn->bhp", state_BHNP, q_BHN)

    tokens = tuple(array.astype(dtype) for array in (q_BTGN, k_BTGN, v_BTHP, beta_BTH, g))
    y_BTHP, final_state_BHNP = scan_tokens(step, initial_state.astype(dtype), tokens, segment_ids)
    y_BTHP = y_BTHP.astype(v_BTHP.dtype)
    return (y_BTHP, final_state_BHNP) if return_final_state else y_BTHP
