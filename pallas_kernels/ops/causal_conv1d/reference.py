# SPDX-License-Identifier: Apache-2.0
"""`causal_conv1d` token by token with direct taps: the oracle of the others (float32, or float64 if the inputs are)."""

import jax
import jax.numpy as jnp

from pallas_kernels.varying import vary_alike


def causal_conv1d_reference(
    x_BTD,
    w_DW,
    b_D=None,
    *,
    activation=None,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    gaps=True,
):
    """See `pallas_kernels.causal_conv1d`; right whatever `gaps` promises."""
    del gaps
    dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
    n_batch, n_tokens, d_model = x_BTD.shape
    if segment_ids is None:
        segment_ids = jnp.ones((n_batch, n_tokens), jnp.int32)
    if initial_state is None:
        initial_state = jnp.zeros((n_batch, w_DW.shape[1] - 1, d_model), dtype)
    w_WD = w_DW.astype(dtype).T
    x_BTD_wide = jnp.where((segment_ids != 0)[:, :, None], x_BTD.astype(dtype), 0)

    def step(carry, token):
        before_BWD, last_id_B = carry
        x_BD, id_B = token
        real_B = id_B != 0
        new_document_B = real_B & (last_id_B != 0) & (id_B != last_id_B)
        before_BWD = jnp.where(new_document_B[:, None, None], 0, before_BWD)
        window_BWD = jnp.concatenate([before_BWD, x_BD[:, None]], axis=1)
        y_BD = jnp.sum(window_BWD * w_WD[None], axis=1)
        y_BD = y_BD if b_D is None else y_BD + b_D.astype(dtype)[None]
        y_BD = jax.nn.silu(y_BD) if activation == "silu" else y_BD
        y_BD = jnp.where(real_B[:, None], y_BD, 0)
        before_BWD = jnp.where(real_B[:, None, None], window_BWD[:, 1:], before_BWD)
        return (before_BWD, jnp.where(real_B, id_B, last_id_B)), y_BD

    start = (initial_state.astype(dtype), jnp.zeros(n_batch, jnp.int32))
    tokens = (jnp.moveaxis(x_BTD_wide, 1, 0), segment_ids.T)
    (final_BWD, _), y_TBD = jax.lax.scan(step, *vary_alike((start, tokens)))
    y_BTD = jnp.moveaxis(y_TBD, 0, 1).astype(x_BTD.dtype)
    return (y_BTD, final_BWD.astype(x_BTD.dtype)) if return_final_state else y_BTD
