# SPDX-License-Identifier: Apache-2.0
"""`rwkv7` in chunks of matrix products: any backend, memory linear in T (see `pallas_kernels.chunks`).

As in the delta rule, what a token's a reads, u_t = S_{t-1}^T a_t, depends on what those before it have read: u solves a
triangular system of Q equations, with the decays up to the token before t. With u the rest is linear attention to two
sets of keys, b with the values u and k with the values v.
"""

import functools

import jax.numpy as jnp

from pallas_kernels import chunks


def rwkv7_xla(
    r_BTHN,
    g_BTHN,
    k_BTHN,
    v_BTHP,
    a_BTHN,
    b_BTHN,
    *,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
):
    """See `pallas_kernels.rwkv7`."""
    tokens = (r_BTHN, g_BTHN, k_BTHN, v_BTHP, a_BTHN, b_BTHN)
    dtype = jnp.result_type(*tokens, jnp.float32)
    if initial_state is None:
        # Of k and v, so that it is sharded like them.
        initial_state = jnp.zeros_like(k_BTHN[:, 0, :, :, None] * v_BTHP[:, 0, :, None, :], dtype)
    chunk = chunks.chunk_size(chunk, v_BTHP.shape[1])
    slab = functools.partial(_slab, dtype=dtype, chunk=chunk)
    y_BTHP, final_state_BHNP = chunks.scan_slabs(slab, tokens, segment_ids, initial_state.astype(dtype), chunk)
    return (y_BTHP, final_state_BHNP) if return_final_state else y_BTHP


def _slab(tokens, marks, state_BHNP, *, dtype, chunk):
    """(y, leaving state) of one slab."""
    r, g, k, v, a, b = (chunks.cut(array.astype(dtype), chunk) for array in tokens)  # [B, C, H, Q, ...]
    decays = chunks.decays_of(g, chunks.seen_of(marks, chunk))

    solve = chunks.unit_inverse(-chunks.products(a, b, decays, exclusive=True))
    from_values = chunks.dot(solve, chunks.dot(chunks.products(a, k, decays, exclusive=True), v))
    from_state = chunks.dot(solve, a * decays.before_BCHQZ)
    written = chunks.dot_tokens(k * decays.after_BCHQZ, v)

    def step(state_BHNP, chunk):
        from_values, from_state, b_left, written, through_BHN = chunk
        removed = from_values + chunks.dot(from_state, state_BHNP)
        leaving = through_BHN[..., None] * state_BHNP + chunks.dot_tokens(b_left, removed) + written
        return leaving, (removed, state_BHNP)

    steps = (from_values, from_state, b * decays.after_BCHQZ, written, decays.through_BCHZ)
    (removed, entering), state_BHNP = chunks.carry(step, state_BHNP, steps)
    y = chunks.dot(chunks.products(r, b, decays), removed) + chunks.dot(chunks.products(r, k, decays), v)
    y += chunks.dot(r * decays.upto_BCHQZ, entering)
    return chunks.uncut(y).astype(tokens[3].dtype), state_BHNP
