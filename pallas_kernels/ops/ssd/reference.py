# SPDX-License-Identifier: Apache-2.0
"""The recurrence of `ssd`, token by token: slow, obvious, the oracle of the others (float64 if the inputs are)."""

import jax
import jax.numpy as jnp

from pallas_kernels.varying import vary_alike


def ssd_reference(
    x_BTHP,
    dt_BTH,
    A_H,
    B_BTGN,
    C_BTGN,
    *,
    D=None,
    decay=None,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
    states=None,
):
    """See `pallas_kernels.ssd`; `chunk` and `states` have no meaning here."""
    del chunk, states
    dtype = jnp.result_type(x_BTHP, dt_BTH, jnp.float32)
    n_batch, n_tokens, n_heads, d_head = x_BTHP.shape
    n_groups, d_state = B_BTGN.shape[2:]
    if segment_ids is None:
        segment_ids = jnp.ones((n_batch, n_tokens), jnp.int32)
    if initial_state is None:
        initial_state = jnp.zeros((n_batch, n_heads, d_head, d_state), dtype)
    skip_HP = jnp.zeros((n_heads, 1), dtype) if D is None else D.astype(dtype).reshape(n_heads, -1)

    def mask(array):
        real = (segment_ids != 0).reshape(segment_ids.shape + (1,) * (array.ndim - 2))
        return jnp.where(real, array.astype(dtype), 0)

    def step(carry, token):
        state_BHPN, last_id_B = carry
        x_BHP, dt_BH, B_BGN, C_BGN, decay_BH, id_B = token
        real_B = id_B != 0
        new_document_B = real_B & (last_id_B != 0) & (id_B != last_id_B)
        state_BHPN = jnp.where(new_document_B[:, None, None, None], 0, state_BHPN)
        B_BHN = jnp.repeat(B_BGN, n_heads // n_groups, axis=1)
        C_BHN = jnp.repeat(C_BGN, n_heads // n_groups, axis=1)
        update_BHPN = jnp.einsum("bh,bhp,bhn->bhpn", dt_BH, x_BHP, B_BHN)
        stepped_BHPN = jnp.exp(decay_BH)[:, :, None, None] * state_BHPN + update_BHPN
        state_BHPN = jnp.where(real_B[:, None, None, None], stepped_BHPN, state_BHPN)
        y_BHP = jnp.einsum("bhpn,bhn->bhp", state_BHPN, C_BHN) + skip_HP[None] * x_BHP
        y_BHP = jnp.where(real_B[:, None, None], y_BHP, 0)
        return (state_BHPN, jnp.where(real_B, id_B, last_id_B)), y_BHP

    masked = [*map(mask, (x_BTHP, dt_BTH, B_BTGN, C_BTGN))]
    masked.append(masked[1] * A_H.astype(dtype)[None, None] if decay is None else mask(decay))
    tokens = [jnp.moveaxis(array, 1, 0) for array in (*masked, segment_ids)]
    start = (initial_state.astype(dtype), jnp.zeros(n_batch, jnp.int32))
    (final_state_BHPN, _), y_TBHP = jax.lax.scan(step, *vary_alike((start, tuple(tokens))))
    y_BTHP = jnp.moveaxis(y_TBHP, 0, 1).astype(x_BTHP.dtype)
    return (y_BTHP, final_state_BHPN) if return_final_state else y_BTHP
