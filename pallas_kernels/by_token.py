# SPDX-License-Identifier: Apache-2.0
"""A recurrence token by token under the segment contract: what the references are made of. Slow and obvious."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.varying import vary_alike


def scan_tokens(step: Callable, state, tokens, segment_ids=None, last_id_B=None):
    """(outputs [B, T, ...], state after the last real token) of `step(state, token) -> (state, output)`.

    state: pytree of [B, ...], continues the first document; every other one starts from zeros. tokens: pytree of
    [B, T, ...], of which a step sees [B, ...]; what stands in padding is zeroed before. last_id_B: id of the last real
    token before these; None: there is none, and the state continues whatever document comes first.
    """
    n_batch, n_tokens = jax.tree.leaves(tokens)[0].shape[:2]
    ids_BT = jnp.ones((n_batch, n_tokens), jnp.int32) if segment_ids is None else segment_ids

    def advance(carry, now):
        state, last_id_B = carry
        token, id_B = now
        real_B = id_B != 0
        starts_B = real_B & (last_id_B != 0) & (id_B != last_id_B)
        entering = jax.tree.map(lambda array: rows_where(~starts_B, array), state)
        stepped, output = step(entering, token)
        state = jax.tree.map(lambda new, old: rows_where(real_B, new, old), stepped, state)
        output = jax.tree.map(lambda array: rows_where(real_B, array), output)
        return (state, jnp.where(real_B, id_B, last_id_B)), output

    tokens = jax.tree.map(lambda array: tokens_where(ids_BT != 0, array), tokens)
    by_token = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (tokens, ids_BT))
    start = (state, jnp.zeros((n_batch,), jnp.int32) if last_id_B is None else last_id_B)
    (state, _), outputs = jax.lax.scan(advance, *vary_alike((start, by_token)))
    return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1), outputs), state


def rows_where(keep_B, array, other=0):
    """Rows of an array [B, ...] where keep, else of the other."""
    return jnp.where(keep_B.reshape(keep_B.shape + (1,) * (array.ndim - 1)), array, other)


def tokens_where(keep_BT, array, other=0):
    """Tokens of an array [B, T, ...] where keep, else of the other."""
    return jnp.where(keep_BT.reshape(keep_BT.shape + (1,) * (array.ndim - 2)), array, other)
