# SPDX-License-Identifier: Apache-2.0
"""`selected_attention` by blocks of queries, each recomputed in the backward pass: nothing of [T, S] is in memory.

The scores of all keys are computed, and those that are not visible masked: what is chosen saves no product here.

Axis letters beyond hybridlm's: Q queries of a block, C chosen blocks, N numbers of blocks, R queries of a key head.
"""

import jax
import jax.numpy as jnp

LOWEST = -1e30  # the scores of keys that are not seen; finite, so that differences with it are numbers
BLOCK = 128


def selected_attention_xla(q_BTHP, k_BSKP, v_BSKP, chosen_BTC, blocks_BS, *, places=None, scale):
    """See `pallas_kernels.selected_attention`."""
    n_batch, n_queries = q_BTHP.shape[:2]
    if places is None:
        places = jnp.broadcast_to(jnp.arange(n_queries, dtype=jnp.int32), (n_batch, n_queries))
    attend = lambda of_queries: _attended(*of_queries, k_BSKP, v_BSKP, blocks_BS, scale)
    if n_queries <= BLOCK:
        return attend((q_BTHP, chosen_BTC, places))
    n_blocks = -(-n_queries // BLOCK)

    def by_block(array):
        room = [(0, 0), (0, n_blocks * BLOCK - n_queries), *[(0, 0)] * (array.ndim - 2)]
        blocks = jnp.pad(array, room).reshape(n_batch, n_blocks, BLOCK, *array.shape[2:])
        return jnp.moveaxis(blocks, 1, 0)

    out = jax.lax.map(jax.checkpoint(attend), tuple(by_block(a) for a in (q_BTHP, chosen_BTC, places)))
    return jnp.moveaxis(out, 0, 1).reshape(n_batch, n_blocks * BLOCK, *out.shape[3:])[:, :n_queries]


def _visible(chosen_BQC, places_BQ, blocks_BS):
    """bool [B, Q, S]."""
    n_batch, size, _ = chosen_BQC.shape
    n_keys = blocks_BS.shape[1]
    row_B11, query_1Q1 = jnp.arange(n_batch)[:, None, None], jnp.arange(size)[None, :, None]
    number_BQC = jnp.where(chosen_BQC < 0, n_keys, chosen_BQC)  # beyond the last: dropped
    is_chosen_BQN = jnp.zeros((n_batch, size, n_keys), bool).at[row_B11, query_1Q1, number_BQC].set(True, mode="drop")
    number_BQS = jnp.broadcast_to(jnp.clip(blocks_BS, 0, n_keys - 1)[:, None], (n_batch, size, n_keys))
    before_BQS = jnp.arange(n_keys, dtype=jnp.int32)[None, None] <= places_BQ[:, :, None]
    return jnp.take_along_axis(is_chosen_BQN, number_BQS, axis=2) & before_BQS & (blocks_BS >= 0)[:, None]


def _attended(q_BQHP, chosen_BQC, places_BQ, k_BSKP, v_BSKP, blocks_BS, scale: float):
    """[B, Q, H, P] of a block of queries."""
    (n_batch, size, n_heads, width), n_kv_heads = q_BQHP.shape, k_BSKP.shape[2]
    dtype = jnp.promote_types(q_BQHP.dtype, jnp.float32)
    visible_BKRQS = _visible(chosen_BQC, places_BQ, blocks_BS)[:, None, None]
    q_BQKRP = q_BQHP.reshape(n_batch, size, n_kv_heads, n_heads // n_kv_heads, width)
    scores = scale * jnp.einsum("bqkrp,bskp->bkrqs", q_BQKRP, k_BSKP, preferred_element_type=dtype)
    scores = jnp.where(visible_BKRQS, scores, LOWEST)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(visible_BKRQS, jnp.exp(scores - top), 0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1)).astype(v_BSKP.dtype)
    out = jnp.einsum("bkrqs,bskp->bqkrp", weights, v_BSKP, preferred_element_type=dtype)
    return out.reshape(n_batch, size, n_heads, v_BSKP.shape[-1]).astype(q_BQHP.dtype)
