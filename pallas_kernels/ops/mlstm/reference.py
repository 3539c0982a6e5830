# SPDX-License-Identifier: Apache-2.0
"""The recurrence of `mlstm`, token by token: the oracle of the others (float64 if the inputs are)."""

import jax
import jax.numpy as jnp

from pallas_kernels.by_token import scan_tokens


def mlstm_reference(
    q_BTGN,
    k_BTGN,
    v_BTHP,
    i_BTH,
    f_BTH,
    *,
    eps,
    segment_ids=None,
    initial_c=None,
    initial_n=None,
    initial_m=None,
    return_final_state=False,
    chunk=None,
):
    """See `pallas_kernels.mlstm`; `chunk` has no meaning here."""
    del chunk
    args = (q_BTGN, k_BTGN, v_BTHP, i_BTH, f_BTH)
    dtype = jnp.result_type(*args, jnp.float32)
    n_batch, _, n_heads, d_head = v_BTHP.shape
    d_key = k_BTGN.shape[-1]
    state = (initial_c, initial_n, initial_m)
    if initial_c is None:
        shape = (n_batch, n_heads, d_key, d_head)
        state = tuple(jnp.zeros(shape[:rank], dtype) for rank in (4, 3, 2))

    def heads(array_BGN):
        return jnp.repeat(array_BGN, n_heads // array_BGN.shape[1], axis=1)

    def step(state, token):
        c_BHNP, n_BHN, m_BH = state
        q_BGN, k_BGN, v_BHP, i_BH, f_BH = token
        q_BHN, k_BHN = heads(q_BGN), heads(k_BGN) / jnp.sqrt(jnp.asarray(d_key, dtype))
        kept_BH = jax.nn.log_sigmoid(f_BH) + m_BH
        m_BH = jnp.maximum(kept_BH, i_BH)
        forget_BH, add_BH = jnp.exp(kept_BH - m_BH), jnp.exp(i_BH - m_BH)
        c_BHNP = forget_BH[..., None, None] * c_BHNP + add_BH[..., None, None] * k_BHN[..., None] * v_BHP[:, :, None]
        n_BHN = forget_BH[..., None] * n_BHN + add_BH[..., None] * k_BHN
        h_BHP = divided(jnp.einsum("bhnp,bhn->bhp", c_BHNP, q_BHN), jnp.einsum("bhn,bhn->bh", n_BHN, q_BHN), m_BH, eps)
        return (c_BHNP, n_BHN, m_BH), h_BHP

    tokens = tuple(array.astype(dtype) for array in args)
    state = tuple(array.astype(dtype) for array in state)
    h_BTHP, state = scan_tokens(step, state, tokens, segment_ids)
    h_BTHP = h_BTHP.astype(v_BTHP.dtype)
    return (h_BTHP, *state) if return_final_state else h_BTHP


def divided(value, weight, m, eps):
    """value / (max(|weight|, exp(-m)) + eps), both sides times exp(min(m, 0)), so that no exponential overflows."""
    small = jnp.exp(jnp.minimum(m, 0))
    divisor = jnp.maximum(jnp.abs(weight) * small, jnp.exp(-jnp.maximum(m, 0))) + eps * small
    return value * (small / divisor)[..., None]
