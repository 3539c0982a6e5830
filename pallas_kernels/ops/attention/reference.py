# SPDX-License-Identifier: Apache-2.0
"""`attention` over the full [T, S] matrix: slow, obvious, the oracle of the others (float64 if the inputs are)."""

import jax
import jax.numpy as jnp


def attention_reference(
    q_BTHP,
    k_BSKP,
    v_BSKP,
    *,
    gate=None,
    causal=True,
    window=None,
    segment_ids=None,
    positions=None,
    scale=None,
    softcap=None,
    sinks=None,
    q_offset=0,
    k_scale=None,
    v_scale=None,
):
    """See `pallas_kernels.attention`; segment_ids and positions are pairs here."""
    dtype = jnp.promote_types(q_BTHP.dtype, jnp.float32)
    if k_scale is not None:
        k_BSKP, v_BSKP = (
            values.astype(dtype) * jnp.swapaxes(scale, 1, 2)[..., None].astype(dtype)
            for values, scale in ((k_BSKP, k_scale), (v_BSKP, v_scale))
        )
    n_batch, n_queries, n_heads, d_head = q_BTHP.shape
    n_keys, n_kv_heads = k_BSKP.shape[1:3]
    k_BSHP = jnp.repeat(k_BSKP.astype(dtype), n_heads // n_kv_heads, axis=2)
    v_BSHP = jnp.repeat(v_BSKP.astype(dtype), n_heads // n_kv_heads, axis=2)
    scores_BHTS = jnp.einsum("bthp,bshp->bhts", q_BTHP.astype(dtype), k_BSHP)
    scores_BHTS *= d_head**-0.5 if scale is None else scale
    if softcap is not None:
        scores_BHTS = softcap * jnp.tanh(scores_BHTS / softcap)

    if positions is None:
        q_position_BT = jnp.arange(n_queries)[None] + jnp.broadcast_to(jnp.asarray(q_offset), (n_batch,))[:, None]
        k_position_BS = jnp.broadcast_to(jnp.arange(n_keys), (n_batch, n_keys))
    else:
        q_position_BT, k_position_BS = positions
    behind_BTS = q_position_BT[:, :, None] - k_position_BS[:, None, :]
    visible_BTS = jnp.ones((n_batch, n_queries, n_keys), bool)
    if causal:
        visible_BTS &= behind_BTS >= 0
    if window is not None:
        visible_BTS &= behind_BTS < window
    if segment_ids is not None:
        q_ids_BT, k_ids_BS = segment_ids
        visible_BTS &= (q_ids_BT[:, :, None] == k_ids_BS[:, None, :]) & (q_ids_BT != 0)[:, :, None]
    visible_BHTS = jnp.broadcast_to(visible_BTS[:, None], scores_BHTS.shape)

    # The sink is a key that everyone sees, without a value.
    sinks_H = jnp.full(n_heads, -jnp.inf, dtype) if sinks is None else sinks.astype(dtype)
    sinks_BHT1 = jnp.broadcast_to(sinks_H[:, None, None], (n_batch, n_heads, n_queries, 1))
    logits = jnp.concatenate([jnp.where(visible_BHTS, scores_BHTS, -jnp.inf), sinks_BHT1], axis=-1)
    any_BHT1 = jnp.any(visible_BHTS, axis=-1, keepdims=True)
    weights_BHTS = jax.nn.softmax(jnp.where(any_BHT1, logits, 0.0), axis=-1)[..., :-1]
    out_BTHP = jnp.einsum("bhts,bshp->bthp", jnp.where(any_BHT1, weights_BHTS, 0.0), v_BSHP)
    if gate is not None:
        gate = gate if gate.ndim == 4 else gate[..., None]
        out_BTHP *= jax.nn.sigmoid(gate.astype(dtype))
    return out_BTHP.astype(q_BTHP.dtype)
