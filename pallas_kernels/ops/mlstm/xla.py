# SPDX-License-Identifier: Apache-2.0
"""`mlstm` in chunks of matrix products: any backend, memory linear in T (see `pallas_kernels.chunks`).

The logarithm of the weight of token j at token i, log decay plus i_j, is at most m_i, the largest of its row and of
what the entering state brings along: weights are exponentials of the difference. A state has its own m, by which the
next chunk's is measured. At a document's first token the state before it is zeros with m = 0, as published, so that m
starts with max(log sigmoid(f), i) there.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import chunks
from pallas_kernels.ops.mlstm.reference import divided


def mlstm_xla(
    q_BTGN,
    k_BTGN,
    v_BTHP,
    i_BTH,
    f_BTH,
    *,
    eps,
    segment_ids=None,
    initial_c=None,
    initial_n=None,
    initial_m=None,
    return_final_state=False,
    chunk=None,
):
    """See `pallas_kernels.mlstm`."""
    tokens = (q_BTGN, k_BTGN, v_BTHP, i_BTH, f_BTH)
    dtype = jnp.result_type(*tokens, jnp.float32)
    state = (initial_c, initial_n, initial_m)
    if initial_c is None:
        # Of the tokens, so that it is sharded like them.
        k_BHN = chunks.repeat_heads(k_BTGN[:, :1], v_BTHP.shape[2])[:, 0]
        state = (k_BHN[..., :, None] * v_BTHP[:, 0, :, None, :], k_BHN, i_BTH[:, 0])
        state = tuple(jnp.zeros_like(array, dtype) for array in state)
    if segment_ids is None:
        segment_ids = jnp.ones_like(i_BTH[:, :, 0], jnp.int32)
    chunk = chunks.chunk_size(chunk, v_BTHP.shape[1])
    slab = functools.partial(_slab, eps=eps, dtype=dtype, chunk=chunk)
    state = tuple(array.astype(dtype) for array in state)
    h_BTHP, state = chunks.scan_slabs(slab, tokens, segment_ids, state, chunk)
    return (h_BTHP, *state) if return_final_state else h_BTHP


def _slab(tokens, marks: chunks.Marks, state, *, eps, dtype, chunk):
    """(h, leaving state) of one slab."""
    h_dtype, n_heads, d_key = tokens[2].dtype, tokens[2].shape[2], tokens[1].shape[-1]
    q_BTHN, k_BTHN = (chunks.repeat_heads(array.astype(dtype), n_heads) for array in tokens[:2])
    i_BTH, f_BTH = (array.astype(dtype) for array in tokens[3:])
    keep_BTH = jnp.where(marks.real_BT[..., None], jax.nn.log_sigmoid(f_BTH), 0)
    i_BTH = jnp.where(marks.real_BT[..., None], i_BTH, -jnp.inf)
    starts_BT1 = (marks.document_BT != marks.entering_BT)[..., None]
    largest_BTH = jnp.where(starts_BT1, jnp.maximum(keep_BTH, i_BTH), i_BTH)  # of what enters m at the token
    arrays = (q_BTHN, k_BTHN * d_key**-0.5, tokens[2].astype(dtype), i_BTH, largest_BTH, keep_BTH)
    q, k, v, i, largest, keep = (chunks.cut(array, chunk) for array in arrays)  # [B, C, H, Q, ...] from here on
    values = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)  # n is the column behind C's
    logs = chunks.log_decays_of(keep[..., None], chunks.seen_of(marks, chunk))
    within = chunks.log_weights(logs)
    upto, after = logs.upto_BCHQZ[..., 0], logs.after_BCHQZ[..., 0]

    # What a chunk adds to the state, measured by its own m, which is -inf where there is nothing to add.
    own_m = jnp.max(after + largest, axis=-1)
    measure = jnp.where(jnp.isfinite(own_m), own_m, 0)
    written = chunks.dot_tokens(k * jnp.exp(after + i - measure[..., None])[..., None], values)

    def step(state, chunk):
        c, m = state
        written, own_m, measure, through = chunk
        left_m = jnp.maximum(through + m, own_m)
        c_left = jnp.exp(through + m - left_m)[..., None, None] * c
        c_left += jnp.where(jnp.isfinite(own_m), jnp.exp(measure - left_m), 0)[..., None, None] * written
        return (c_left, left_m), (c, m)

    c_BHNP, n_BHN, m_BH = state
    start = (jnp.concatenate([c_BHNP, n_BHN[..., None]], axis=-1), m_BH)
    steps = (written, own_m, measure, logs.through_BCHZ[..., 0])
    (entering, entering_m), (c_BHNP, m_BH) = chunks.carry(step, start, steps)

    m = jnp.maximum(jnp.max(within + largest[..., None, :], axis=-1), upto + entering_m[..., None])
    pairs = chunks.dot(q, jnp.swapaxes(k, -1, -2)) * jnp.exp(within + i[..., None, :] - m[..., None])
    read = jnp.exp(upto + entering_m[..., None] - m)[..., None] * chunks.dot(q, entering)
    read += chunks.dot(pairs, values)
    h = divided(read[..., :-1], read[..., -1], m, eps)
    return chunks.uncut(h).astype(h_dtype), (c_BHNP[..., :-1], c_BHNP[..., -1], m_BH)
