# SPDX-License-Identifier: Apache-2.0
"""The recurrence of `linear_scan`, token by token: the oracle of the others (float64 if the inputs are)."""

import jax.numpy as jnp

from pallas_kernels.by_token import scan_tokens


def linear_scan_reference(x_BTD, g_BTD, *, segment_ids=None, initial_state=None, return_final_state=False):
    """See `pallas_kernels.linear_scan`."""
    dtype = jnp.result_type(x_BTD, g_BTD, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((x_BTD.shape[0], x_BTD.shape[2]), dtype)

    def step(h_BD, token):
        x_BD, g_BD = token
        h_BD = jnp.exp(g_BD) * h_BD + x_BD
        return h_BD, h_BD

    tokens = (x_BTD.astype(dtype), g_BTD.astype(dtype))
    h_BTD, final_state_BD = scan_tokens(step, initial_state.astype(dtype), tokens, segment_ids)
    h_BTD = h_BTD.astype(x_BTD.dtype)
    return (h_BTD, final_state_BD) if return_final_state else h_BTD
