# SPDX-License-Identifier: Apache-2.0
"""`selected_attention` with its tokens split over devices: they gather keys and values, queries stay where they are."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def selected_attention_context(attend: Callable, args: tuple, *, context_axis: str, places, scale: float) -> jax.Array:
    """`attend(*args, ...)`, an implementation of the op, on tokens of which each device of the axis has a share."""
    q_BTHP, k_BTKP, v_BTKP, chosen_BTC, blocks_BT = args
    gather = lambda array: jax.lax.all_gather(array, context_axis, axis=1, tiled=True)
    if places is None:
        n_batch, n_queries = q_BTHP.shape[:2]
        first = jax.lax.axis_index(context_axis) * n_queries
        places = jnp.broadcast_to(first + jnp.arange(n_queries, dtype=jnp.int32), (n_batch, n_queries))
    return attend(q_BTHP, gather(k_BTKP), gather(v_BTKP), chosen_BTC, gather(blocks_BT), places=places, scale=scale)
