# SPDX-License-Identifier: Apache-2.0
"""The recurrence of `selective_scan`, token by token: slow, obvious, the oracle (float64 if the inputs are)."""

import jax
import jax.numpy as jnp

from pallas_kernels.varying import vary_alike


def selective_scan_reference(
    x_BTD,
    dt_BTD,
    A_DN,
    B_BTGN,
    C_BTGN,
    *,
    D=None,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
):
    """See `pallas_kernels.selective_scan`; `chunk` has no meaning here."""
    del chunk
    dtype = jnp.result_type(x_BTD, dt_BTD, jnp.float32)
    n_batch, n_tokens, n_channels = x_BTD.shape
    n_groups, d_state = B_BTGN.shape[2:]
    if segment_ids is None:
        segment_ids = jnp.ones((n_batch, n_tokens), jnp.int32)
    if initial_state is None:
        initial_state = jnp.zeros((n_batch, n_channels, d_state), dtype)
    skip_D = jnp.zeros((n_channels,), dtype) if D is None else D.astype(dtype)
    A_DN = A_DN.astype(dtype)

    def mask(array):
        real = (segment_ids != 0).reshape(segment_ids.shape + (1,) * (array.ndim - 2))
        return jnp.where(real, array.astype(dtype), 0)

    def step(carry, token):
        state_BDN, last_id_B = carry
        x_BD, dt_BD, B_BGN, C_BGN, id_B = token
        real_B = id_B != 0
        new_document_B = real_B & (last_id_B != 0) & (id_B != last_id_B)
        state_BDN = jnp.where(new_document_B[:, None, None], 0, state_BDN)
        B_BDN = jnp.repeat(B_BGN, n_channels // n_groups, axis=1)
        C_BDN = jnp.repeat(C_BGN, n_channels // n_groups, axis=1)
        stepped_BDN = jnp.exp(dt_BD[:, :, None] * A_DN[None]) * state_BDN + (dt_BD * x_BD)[:, :, None] * B_BDN
        state_BDN = jnp.where(real_B[:, None, None], stepped_BDN, state_BDN)
        y_BD = jnp.einsum("bdn,bdn->bd", state_BDN, C_BDN) + skip_D[None] * x_BD
        y_BD = jnp.where(real_B[:, None], y_BD, 0)
        return (state_BDN, jnp.where(real_B, id_B, last_id_B)), y_BD

    tokens = [jnp.moveaxis(array, 1, 0) for array in (*map(mask, (x_BTD, dt_BTD, B_BTGN, C_BTGN)), segment_ids)]
    start = (initial_state.astype(dtype), jnp.zeros(n_batch, jnp.int32))
    (final_state_BDN, _), y_TBD = jax.lax.scan(step, *vary_alike((start, tuple(tokens))))
    y_BTD = jnp.moveaxis(y_TBD, 0, 1).astype(x_BTD.dtype)
    return (y_BTD, final_state_BDN) if return_final_state else y_BTD
