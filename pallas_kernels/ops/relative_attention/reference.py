# SPDX-License-Identifier: Apache-2.0
"""`relative_attention` over the full [T, S] matrix: slow, obvious, the oracle of the others (float64 if the inputs
are)."""

import jax
import jax.numpy as jnp


def relative_attention_reference(
    q_BTHP, k_BSKP, v_BSKP, r_BTHR, profiles_RE, *, window=None, segment_ids=None, positions=None, scale
):
    """See `pallas_kernels.relative_attention`; segment_ids and positions are pairs here."""
    dtype = jnp.promote_types(q_BTHP.dtype, jnp.float32)
    n_batch, n_queries, n_heads, _ = q_BTHP.shape
    n_keys, n_kv_heads = k_BSKP.shape[1:3]
    extent = profiles_RE.shape[1]
    k_BSHP, v_BSHP = (jnp.repeat(a.astype(dtype), n_heads // n_kv_heads, axis=2) for a in (k_BSKP, v_BSKP))
    if positions is None:
        positions = tuple(jnp.broadcast_to(jnp.arange(n), (n_batch, n)) for n in (n_queries, n_keys))
    distance_BTS = positions[0][:, :, None] - positions[1][:, None, :]

    by_distance_BHTE = jnp.einsum("bthr,re->bhte", r_BTHR.astype(dtype), profiles_RE.astype(dtype))
    index_BHTS = jnp.broadcast_to(jnp.clip(distance_BTS, 0, extent - 1)[:, None], (n_batch, n_heads, n_queries, n_keys))
    near_BTS = (distance_BTS >= 0) & (distance_BTS < extent)
    bias_BHTS = jnp.where(near_BTS[:, None], jnp.take_along_axis(by_distance_BHTE, index_BHTS, axis=-1), 0.0)
    scores_BHTS = scale * jnp.einsum("bthp,bshp->bhts", q_BTHP.astype(dtype), k_BSHP) + bias_BHTS

    visible_BTS = distance_BTS >= 0
    if window is not None:
        visible_BTS &= distance_BTS < window
    if segment_ids is not None:
        q_ids_BT, k_ids_BS = segment_ids
        visible_BTS &= (q_ids_BT[:, :, None] == k_ids_BS[:, None, :]) & (q_ids_BT != 0)[:, :, None]
    any_BHT1 = jnp.any(visible_BTS, axis=-1)[:, None, :, None]
    logits_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS, -jnp.inf)
    weights_BHTS = jax.nn.softmax(jnp.where(any_BHT1, logits_BHTS, 0.0), axis=-1)
    out_BTHP = jnp.einsum("bhts,bshp->bthp", jnp.where(any_BHT1, weights_BHTS, 0.0), v_BSHP)
    return out_BTHP.astype(q_BTHP.dtype)
