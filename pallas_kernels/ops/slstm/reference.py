# SPDX-License-Identifier: Apache-2.0
"""The recurrence of `slstm`, token by token: the oracle of the others (float64 if the inputs are)."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.by_token import scan_tokens

STATES = ("initial_y", "initial_c", "initial_n", "initial_m")


def slstm_reference(x_BTGHP, R_HGPP, b_GHP, *, segment_ids=None, return_final_state=False, **states):
    """See `pallas_kernels.slstm`."""
    state = start_of(x_BTGHP, R_HGPP, b_GHP, states)
    step = functools.partial(next_state, R_HGPP, b_GHP)
    y_BTHP, state = scan_tokens(step, state, x_BTGHP.astype(state[0].dtype), segment_ids)
    y_BTHP = y_BTHP.astype(x_BTGHP.dtype)
    return (y_BTHP, *state) if return_final_state else y_BTHP


def start_of(x_BTGHP, R_HGPP, b_GHP, states: dict) -> tuple:
    """(y, c, n, m) to begin with, in the dtype that all is computed in."""
    given = [array for array in (x_BTGHP, R_HGPP, b_GHP) if array is not None]
    dtype = jnp.result_type(*given, jnp.float32)
    zeros_BHP = jnp.zeros_like(x_BTGHP[:, 0, 0], dtype)
    return tuple(zeros_BHP if states[name] is None else states[name].astype(dtype) for name in STATES)


def next_state(R_HGPP, b_GHP, state, x_BGHP):
    """((y, c, n, m), y) behind one token."""
    y_BHP, c_BHP, n_BHP, m_BHP = state
    raw_BGHP = x_BGHP + jnp.einsum("hgpq,bhq->bghp", R_HGPP.astype(y_BHP.dtype), y_BHP)
    if b_GHP is not None:
        raw_BGHP += b_GHP.astype(y_BHP.dtype)[None]
    i_BHP, f_BHP, z_BHP, o_BHP = (raw_BGHP[:, gate] for gate in range(4))
    kept_BHP = m_BHP + jax.nn.log_sigmoid(f_BHP)
    m_BHP = jnp.where(n_BHP == 0, i_BHP, jnp.maximum(i_BHP, kept_BHP))
    add_BHP, forget_BHP = jnp.exp(i_BHP - m_BHP), jnp.exp(jnp.minimum(kept_BHP - m_BHP, 0))
    c_BHP = forget_BHP * c_BHP + add_BHP * jnp.tanh(z_BHP)
    n_BHP = forget_BHP * n_BHP + add_BHP
    y_BHP = jax.nn.sigmoid(o_BHP) * c_BHP / n_BHP
    return (y_BHP, c_BHP, n_BHP, m_BHP), y_BHP
