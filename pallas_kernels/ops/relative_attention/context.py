# SPDX-License-Identifier: Apache-2.0
"""`relative_attention` with its tokens split over devices: they gather keys and values, queries stay where they are."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.segments import document_ids, real_positions


def relative_attention_context(
    attend: Callable, args: tuple, *, context_axis: str, one_side: bool, **options
) -> jax.Array:
    """`attend(*args, **options)`, an implementation of the op, on tokens of which each device of the axis has a share.

    one_side: segment_ids are the raw ids of both sides and not yet numbers of documents.
    """
    q_BTHP, k_BTKP, v_BTKP, r_BTHR, profiles_RE = args
    n, index = context.axis_size(context_axis), jax.lax.axis_index(context_axis)
    n_batch, n_queries = q_BTHP.shape[:2]
    gather = lambda array: jax.lax.all_gather(array, context_axis, axis=1, tiled=True)
    own = lambda array: jax.lax.dynamic_slice_in_dim(array, index * n_queries, n_queries, axis=1)
    ids, positions = options["segment_ids"], options["positions"]
    place_BS = jnp.broadcast_to(jnp.arange(n * n_queries, dtype=jnp.int32), (n_batch, n * n_queries))
    if ids is not None:
        k_ids_BS = gather(ids[1])
        if one_side:
            place_BS, k_ids_BS = real_positions(k_ids_BS), document_ids(k_ids_BS)
        ids = (own(k_ids_BS) if one_side else ids[0], k_ids_BS)
    positions = (own(place_BS), place_BS) if positions is None else (positions[0], gather(positions[1]))
    options |= {"segment_ids": ids, "positions": positions}
    return attend(q_BTHP, gather(k_BTKP), gather(v_BTKP), r_BTHR, profiles_RE, **options)
