# SPDX-License-Identifier: Apache-2.0
"""`linear_scan` as an associative scan over (decay, state): any backend, memory linear in T.

The gradient is the same recurrence from the last token to the first, so that nothing of the scan's own steps is kept:
with G_t = exp(g_{t+1}) G_{t+1} + dh_t, dx_t = G_t and dg_t = G_t exp(g_t) h_{t-1}, each a product of its own terms.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.by_token import tokens_where
from pallas_kernels.segments import document_numbers


def linear_scan_xla(x_BTD, g_BTD, *, segment_ids=None, initial_state=None, return_final_state=False):
    """See `pallas_kernels.linear_scan`."""
    dtype = jnp.result_type(x_BTD, g_BTD, jnp.float32)
    x, g = x_BTD.astype(dtype), g_BTD.astype(dtype)
    if segment_ids is not None:
        document_BT = document_numbers(segment_ids)
        before_BT = jnp.pad(document_BT[:, :-1], ((0, 0), (1, 0)))
        x, g = (tokens_where(segment_ids != 0, array) for array in (x, g))
        g = tokens_where(document_BT == before_BT, g, -jnp.inf)
    start_BD = jnp.zeros_like(x[:, 0]) if initial_state is None else initial_state.astype(dtype)
    h_BTD = _scan(x, g, start_BD)
    final_state_BD = h_BTD[:, -1]
    if segment_ids is not None:
        h_BTD = tokens_where(segment_ids != 0, h_BTD)
    h_BTD = h_BTD.astype(x_BTD.dtype)
    return (h_BTD, final_state_BD) if return_final_state else h_BTD


def _states(x_BTD, g_BTD, start_BD):
    """h of all tokens."""
    a_BTD = jnp.exp(g_BTD)
    first_BD = a_BTD[:, 0] * start_BD + x_BTD[:, 0]
    return _associative(a_BTD, jnp.concatenate([first_BD[:, None], x_BTD[:, 1:]], axis=1))


_scan = jax.custom_vjp(_states)


def _forward(x_BTD, g_BTD, start_BD):
    return _states(x_BTD, g_BTD, start_BD), (x_BTD, g_BTD, start_BD)


def _backward(kept, dh_BTD):
    x_BTD, g_BTD, start_BD = kept
    a_BTD = jnp.exp(g_BTD)
    before_BTD = jnp.concatenate([start_BD[:, None], _states(x_BTD, g_BTD, start_BD)[:, :-1]], axis=1)
    after_BTD = jnp.concatenate([a_BTD[:, 1:], jnp.zeros_like(a_BTD[:, :1])], axis=1)
    dx_BTD = _associative(after_BTD, dh_BTD, reverse=True)
    return dx_BTD, dx_BTD * a_BTD * before_BTD, dx_BTD[:, 0] * a_BTD[:, 0]


_scan.defvjp(_forward, _backward)


def _associative(a_BTD, x_BTD, reverse: bool = False):
    """h_t = a_t h_{t-1} + x_t from nothing; reverse: h_t = a_t h_{t+1} + x_t."""

    def join(earlier, later):
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    return jax.lax.associative_scan(join, (a_BTD, x_BTD), axis=1, reverse=reverse)[1]
