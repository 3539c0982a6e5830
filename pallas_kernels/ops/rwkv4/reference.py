# SPDX-License-Identifier: Apache-2.0
"""The recurrence of `rwkv4`, token by token: the oracle of the others (float64 if the inputs are)."""

import jax
import jax.numpy as jnp

from pallas_kernels.by_token import scan_tokens

STATES = ("initial_a", "initial_b", "initial_m")
NOTHING = -1e30  # m of a state that holds nothing: less than any key, and still finite


def rwkv4_reference(k_BTD, v_BTD, g_D, bonus_D, *, segment_ids=None, return_final_state=False, **states):
    """See `pallas_kernels.rwkv4`."""
    state = start_of(k_BTD, v_BTD, g_D, bonus_D, states)
    dtype = state[0].dtype
    g_1D, bonus_1D = g_D.astype(dtype)[None], bonus_D.astype(dtype)[None]

    def step(state, token):
        k_BD, v_BD = token
        y_BD = read(state, k_BD + bonus_1D, v_BD)
        a_BD, b_BD, m_BD = state
        m_BD = level(b_BD, m_BD) + g_1D
        left_BD = jnp.maximum(m_BD, k_BD)
        keep_BD, add_BD = jnp.exp(m_BD - left_BD), jnp.exp(k_BD - left_BD)
        return (keep_BD * a_BD + add_BD * v_BD, keep_BD * b_BD + add_BD, left_BD), y_BD

    y_BTD, state = scan_tokens(step, state, (k_BTD.astype(dtype), v_BTD.astype(dtype)), segment_ids)
    y_BTD = y_BTD.astype(v_BTD.dtype)
    return (y_BTD, *state) if return_final_state else y_BTD


def start_of(k_BTD, v_BTD, g_D, bonus_D, states: dict) -> tuple[jax.Array, ...]:
    """(a, b, m) to begin with, in the dtype that all is computed in."""
    dtype = jnp.result_type(k_BTD, v_BTD, g_D, bonus_D, jnp.float32)
    zeros_BD = jnp.zeros_like(v_BTD[:, 0], dtype)
    return tuple(zeros_BD if states[name] is None else states[name].astype(dtype) for name in STATES)


def level(b, m):
    """m, of a state that holds something."""
    return jnp.where(b == 0, NOTHING, m)


def read(state, own_key, v):
    """What a token reads from the state before it, its own value among it."""
    a, b, m = state
    m = level(b, m)
    largest = jnp.maximum(m, own_key)
    keep, add = jnp.exp(m - largest), jnp.exp(own_key - largest)
    return (keep * a + add * v) / (keep * b + add)
