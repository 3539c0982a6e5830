# SPDX-License-Identifier: Apache-2.0
"""The recurrence of `linear_attention`, token by token: the oracle of the others (float64 if the inputs are)."""

import jax.numpy as jnp

from pallas_kernels.by_token import scan_tokens
from pallas_kernels.ops.linear_attention import features


def linear_attention_reference(
    q_BTGN,
    k_BTGN,
    v_BTHP,
    g,
    *,
    bonus=None,
    normalizer=False,
    eps=1e-6,
    feature_map=None,
    scale,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
):
    """See `pallas_kernels.linear_attention`; `chunk` has no meaning here."""
    del chunk
    given = [array for array in (q_BTGN, k_BTGN, v_BTHP, g) if array is not None]
    dtype = jnp.result_type(*given, jnp.float32)
    n_batch, n_tokens, n_heads, d_head = v_BTHP.shape
    if initial_state is None:
        shape = (n_batch, n_heads, features.n_features(feature_map, k_BTGN.shape[-1]), d_head + bool(normalizer))
        initial_state = jnp.zeros(shape, dtype)
    g = jnp.zeros((n_heads,), dtype) if g is None else g
    g = jnp.broadcast_to(g, (n_batch, n_tokens, n_heads)) if g.ndim == 1 else g
    g = g[..., None] if g.ndim == 3 else g

    def heads(array_BGN):
        return jnp.repeat(array_BGN, n_heads // array_BGN.shape[1], axis=1)

    def step(state_BHNP, token):
        q_BGN, k_BGN, v_BHP, g_BHN = token
        q_BHN, k_BHN = scale * heads(q_BGN), heads(k_BGN)
        if normalizer:
            v_BHP = jnp.concatenate([v_BHP, jnp.ones_like(v_BHP[..., :1])], axis=-1)
        added_BHNP = features.of_keys(feature_map, k_BHN)[..., None] * v_BHP[..., None, :]
        read_BHNP = stepped_BHNP = jnp.exp(g_BHN)[..., None] * state_BHNP + added_BHNP
        if bonus is not None:
            read_BHNP = state_BHNP + bonus.astype(dtype)[None, :, :, None] * added_BHNP
        y_BHP = jnp.einsum("bhnp,bhn->bhp", read_BHNP, features.of_queries(feature_map, q_BHN))
        if normalizer:
            y_BHP = y_BHP[..., :-1] / (y_BHP[..., -1:] + eps)
        return stepped_BHNP, y_BHP

    tokens = tuple(array.astype(dtype) for array in (q_BTGN, k_BTGN, v_BTHP, g))
    y_BTHP, final_state_BHNP = scan_tokens(step, initial_state.astype(dtype), tokens, segment_ids)
    y_BTHP = y_BTHP.astype(v_BTHP.dtype)
    return (y_BTHP, final_state_BHNP) if return_final_state else y_BTHP
