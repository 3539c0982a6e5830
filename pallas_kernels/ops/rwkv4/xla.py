# SPDX-License-Identifier: Apache-2.0
"""`rwkv4` as an associative scan over (log decay, a, b, m): any backend, memory linear in T.

Each token is the map A -> exp(g) A + exp(k) v; two maps are one, measured by the larger of their exponents. Slabs of
tokens are scanned at once, and again for the backward pass.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import chunks
from pallas_kernels.by_token import tokens_where
from pallas_kernels.ops.rwkv4.reference import NOTHING, level, read, start_of

SLAB = 512


def rwkv4_xla(k_BTD, v_BTD, g_D, bonus_D, *, segment_ids=None, return_final_state=False, **states):
    """See `pallas_kernels.rwkv4`."""
    state = start_of(k_BTD, v_BTD, g_D, bonus_D, states)
    dtype = state[0].dtype
    if segment_ids is None:
        segment_ids = jnp.ones_like(v_BTD[:, :, 0], jnp.int32)

    def slab(tokens, marks, state):
        k, v = (array.astype(dtype) for array in tokens)
        starts_BT = marks.document_BT != marks.entering_BT
        decay = jnp.broadcast_to(g_D.astype(dtype), k.shape)
        decay = tokens_where(~starts_BT, tokens_where(marks.real_BT, decay), -jnp.inf)
        ones = tokens_where(marks.real_BT, jnp.ones_like(k))
        maps = jax.lax.associative_scan(join, (decay, v, ones, tokens_where(marks.real_BT, k, NOTHING)), axis=1)
        a_BD, b_BD, m_BD = state
        entering = tuple(array[:, None] for array in (jnp.zeros_like(a_BD), a_BD, b_BD, level(b_BD, m_BD)))
        _, *after = join(entering, maps)
        before = (jnp.concatenate([first, array[:, :-1]], axis=1) for first, array in zip(entering[1:], after))
        before = tuple(tokens_where(~starts_BT, array) for array in before)
        y = read(before, k + bonus_D.astype(dtype)[None, None], v)
        a_BD, b_BD, left_BD = (array[:, -1] for array in after)
        return y.astype(v_BTD.dtype), (a_BD, b_BD, jnp.where(b_BD == 0, m_BD, left_BD))

    y_BTD, state = chunks.scan_slabs(slab, (k_BTD, v_BTD), segment_ids, state, chunk=1, longest=SLAB)
    return (y_BTD, *state) if return_final_state else y_BTD


def join(earlier, later):
    """Of maps (log decay, a, b, m)."""
    decay_1, a_1, b_1, m_1 = earlier
    decay_2, a_2, b_2, m_2 = later
    m = jnp.maximum(decay_2 + m_1, m_2)
    keep, add = jnp.exp(decay_2 + m_1 - m), jnp.exp(m_2 - m)
    return decay_1 + decay_2, keep * a_1 + add * a_2, keep * b_1 + add * b_2, m
