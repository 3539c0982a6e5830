# SPDX-License-Identifier: Apache-2.0
"""`linear_attention` in chunks of matrix products: any backend, memory linear in T (see `pallas_kernels.chunks`).

Within a chunk the pairs of tokens are weighed as such; features, of which a Taylor map has many, are made only where
they meet the state.
"""

import functools

import jax.numpy as jnp

from pallas_kernels import chunks
from pallas_kernels.ops.linear_attention import features


def linear_attention_xla(
    q_BTGN,
    k_BTGN,
    v_BTHP,
    g,
    *,
    bonus=None,
    normalizer=False,
    eps=1e-6,
    feature_map=None,
    scale,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
):
    """See `pallas_kernels.linear_attention`."""
    given = [array for array in (q_BTGN, k_BTGN, v_BTHP, g) if array is not None]
    dtype = jnp.result_type(*given, jnp.float32)
    ones_BTH1 = jnp.ones_like(v_BTHP[..., :1], dtype)  # values of `normalizer`; zeroed in padding, as all tokens are
    if initial_state is None:
        # Of k and v, so that it is sharded like them.
        k_BHN = features.of_keys(feature_map, chunks.repeat_heads(k_BTGN[:, :1], v_BTHP.shape[2])[:, 0])
        values_BHP = jnp.concatenate([v_BTHP[:, 0].astype(dtype), ones_BTH1[:, 0]][: 1 + bool(normalizer)], axis=-1)
        initial_state = jnp.zeros_like(k_BHN[..., :, None] * values_BHP[..., None, :], dtype)
    g = jnp.zeros_like(v_BTHP[..., 0], dtype) if g is None else g
    g = jnp.broadcast_to(g, v_BTHP.shape[:3]) if g.ndim == 1 else g
    g = g[..., None] if g.ndim == 3 else g
    chunk = chunks.chunk_size(chunk, v_BTHP.shape[1])
    options = dict(bonus=bonus, normalizer=normalizer, eps=eps, feature_map=feature_map, scale=scale)
    slab = functools.partial(_slab, **options, dtype=dtype, chunk=chunk)
    tokens = (q_BTGN, k_BTGN, v_BTHP, g, ones_BTH1 if normalizer else None)
    y_BTHP, final_state_BHNP = chunks.scan_slabs(slab, tokens, segment_ids, initial_state.astype(dtype), chunk)
    return (y_BTHP, final_state_BHNP) if return_final_state else y_BTHP


def _slab(tokens, marks, state_BHNP, *, bonus, normalizer, eps, feature_map, scale, dtype, chunk):
    """(y, leaving state) of one slab."""
    y_dtype, n_heads = tokens[2].dtype, tokens[2].shape[2]
    q_BTHN, k_BTHN = (chunks.repeat_heads(array.astype(dtype), n_heads) for array in tokens[:2])
    arrays = (scale * q_BTHN, k_BTHN, *(array.astype(dtype) for array in tokens[2:] if array is not None))
    q, k, v, g, *ones = (chunks.cut(array, chunk) for array in arrays)  # [B, C, H, Q, ...] from here on
    decays = chunks.decays_of(g, chunks.seen_of(marks, chunk))
    if normalizer:
        v = jnp.concatenate([v, *ones], axis=-1)

    if feature_map is None:
        pairs = chunks.products(q, k, decays, exclusive=bonus is not None)
    else:
        scores = chunks.dot(q, jnp.swapaxes(k, -1, -2))
        pairs = features.weights(feature_map, scores) * chunks.weights(decays)
    written = chunks.dot_tokens(features.of_keys(feature_map, k) * decays.after_BCHQZ, v)

    def step(state_BHNP, chunk):
        written, through_BHZ = chunk
        return through_BHZ[..., None] * state_BHNP + written, state_BHNP

    entering, state_BHNP = chunks.carry(step, state_BHNP, (written, decays.through_BCHZ))
    read_decays = decays.upto_BCHQZ if bonus is None else decays.before_BCHQZ
    y = chunks.dot(pairs, v) + chunks.dot(features.of_queries(feature_map, q) * read_decays, entering)
    if bonus is not None:
        y += jnp.sum(q * bonus.astype(dtype)[None, None, :, None] * k, axis=-1, keepdims=True) * v
    if normalizer:
        y = y[..., :-1] / (y[..., -1:] + eps)
    return chunks.uncut(y).astype(y_dtype), state_BHNP
