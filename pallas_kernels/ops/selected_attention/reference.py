# SPDX-License-Identifier: Apache-2.0
"""`selected_attention` over the full [T, S] matrix: slow, obvious, the oracle of the others (float64 if the inputs
are)."""

import jax
import jax.numpy as jnp


def selected_attention_reference(q_BTHP, k_BSKP, v_BSKP, chosen_BTC, blocks_BS, *, places=None, scale):
    """See `pallas_kernels.selected_attention`."""
    dtype = jnp.promote_types(q_BTHP.dtype, jnp.float32)
    n_batch, n_queries, n_heads, _ = q_BTHP.shape
    n_keys, n_kv_heads = k_BSKP.shape[1:3]
    k_BSHP, v_BSHP = (jnp.repeat(a.astype(dtype), n_heads // n_kv_heads, axis=2) for a in (k_BSKP, v_BSKP))
    if places is None:
        places = jnp.broadcast_to(jnp.arange(n_queries, dtype=jnp.int32), (n_batch, n_queries))
    is_chosen_BTS = (chosen_BTC[:, :, None, :] == blocks_BS[:, None, :, None]).any(axis=-1)
    before_BTS = jnp.arange(n_keys, dtype=jnp.int32)[None, None] <= places[:, :, None]
    visible_BTS = is_chosen_BTS & before_BTS & (blocks_BS >= 0)[:, None]

    scores_BHTS = scale * jnp.einsum("bthp,bshp->bhts", q_BTHP.astype(dtype), k_BSHP)
    any_BHT1 = jnp.any(visible_BTS, axis=-1)[:, None, :, None]
    logits_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS, -jnp.inf)
    weights_BHTS = jax.nn.softmax(jnp.where(any_BHT1, logits_BHTS, 0.0), axis=-1)
    out_BTHP = jnp.einsum("bhts,bshp->bthp", jnp.where(any_BHT1, weights_BHTS, 0.0), v_BSHP)
    return out_BTHP.astype(q_BTHP.dtype)
