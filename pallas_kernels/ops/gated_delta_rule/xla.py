# SPDX-License-Identifier: Apache-2.0
"""`gated_delta_rule` in chunks of matrix products: any backend, memory linear in T (see `pallas_kernels.chunks`).

Within a chunk each token's correction `beta_t (v_t - S'^T k_t)` depends on those of the tokens before it: a triangular
system of Q equations, whose inverse T is that of Yang et al. 2024 (arXiv:2406.06484, section 3). With it the chunk's
corrections are `T (beta v) - T (beta k o decay) S` of the entering state S, and from there it is linear attention.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import chunks


def gated_delta_rule_xla(
    q_BTGN,
    k_BTGN,
    v_BTHP,
    beta_BTH,
    g,
    *,
    normalize,
    scale,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
):
    """See `pallas_kernels.gated_delta_rule`."""
    dtype = jnp.result_type(q_BTGN, k_BTGN, v_BTHP, beta_BTH, jnp.float32)
    if initial_state is None:
        # Of k and v, so that it is sharded like them.
        k_BHN = chunks.repeat_heads(k_BTGN[:, :1], v_BTHP.shape[2])[:, 0]
        initial_state = jnp.zeros_like(k_BHN[..., :, None] * v_BTHP[:, 0, :, None, :], dtype)
    g = jnp.zeros_like(beta_BTH) if g is None else g
    g = g[..., None] if g.ndim == 3 else g
    chunk = chunks.chunk_size(chunk, v_BTHP.shape[1])
    slab = functools.partial(_slab, normalize=normalize, scale=scale, dtype=dtype, chunk=chunk)
    tokens = (q_BTGN, k_BTGN, v_BTHP, beta_BTH, g)
    y_BTHP, final_state_BHNP = chunks.scan_slabs(slab, tokens, segment_ids, initial_state.astype(dtype), chunk)
    return (y_BTHP, final_state_BHNP) if return_final_state else y_BTHP


def _slab(tokens, marks, state_BHNP, *, normalize, scale, dtype, chunk):
    """(y, leaving state) of one slab."""
    y_dtype, n_heads = tokens[2].dtype, tokens[2].shape[2]
    q_BTHN, k_BTHN = (chunks.repeat_heads(_length(a.astype(dtype), normalize), n_heads) for a in tokens[:2])
    arrays = (scale * q_BTHN, k_BTHN, *(a.astype(dtype) for a in tokens[2:4]), tokens[4].astype(dtype))
    q, k, v, beta, g = (chunks.cut(array, chunk) for array in arrays)  # [B, C, H, Q, ...] from here on
    beta = beta[..., None]
    decays = chunks.decays_of(g, chunks.seen_of(marks, chunk))

    solve = chunks.unit_inverse(jnp.tril(chunks.products(beta * k, k, decays), -1))
    from_values = chunks.dot(solve, beta * v)
    from_state = chunks.dot(solve, beta * k * decays.upto_BCHQZ)

    def step(state_BHNP, chunk):
        from_values, from_state, k_left, through_BHZ = chunk
        corrections = from_values - chunks.dot(from_state, state_BHNP)
        leaving = through_BHZ[..., None] * state_BHNP + chunks.dot_tokens(k_left, corrections)
        return leaving, (corrections, state_BHNP)

    steps = (from_values, from_state, k * decays.after_BCHQZ, decays.through_BCHZ)
    (corrections, entering), state_BHNP = chunks.carry(step, state_BHNP, steps)
    y = chunks.dot(chunks.products(q, k, decays), corrections) + chunks.dot(q * decays.upto_BCHQZ, entering)
    return chunks.uncut(y).astype(y_dtype), state_BHNP


def _length(array, normalize: bool):
    """Divided by its length over the last axis, if asked for."""
    if not normalize:
        return array
    return array * jax.lax.rsqrt(jnp.sum(array**2, axis=-1, keepdims=True) + 1e-6)
