# SPDX-License-Identifier: Apache-2.0
"""`attention` with its tokens split over devices, on top of any implementation.

Keys and values, fewer heads than queries, are gathered from all devices; each serves queries of its own. Under a causal
mask later queries see more keys, so the queries are spread: each of n devices keeps the first half of its shard and
swaps the second half with its mirror, device n - 1 - i. Of the 2 n halves it then serves numbers 2 i and
2 n - 1 - 2 i, which together see the same number of keys everywhere. Outside, tokens stay in their order.

Axis letters beyond hybridlm's: S keys of all devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.ops.attention.xla import apply_gate
from pallas_kernels.segments import document_ids


def attention_context(attend: Callable, args: tuple, *, context_axis: str, one_side: bool, **options) -> jax.Array:
    """`attend(*args, **options)`, attention by any implementation, on tokens split over the axis.

    one_side: segment_ids are the raw ids of both sides and not yet numbers of documents.
    """
    q_BTHP, k_BTKP, v_BTKP = args
    n, index = context.axis_size(context_axis), jax.lax.axis_index(context_axis)
    n_batch, n_queries = q_BTHP.shape[:2]

    def gather(array):
        return jax.lax.all_gather(array, context_axis, axis=1, tiled=True)

    ids, positions = options["segment_ids"], options["positions"]
    if ids is not None:
        k_ids_BS = gather(ids[1])
        if one_side:
            k_ids_BS = document_ids(k_ids_BS)
            ids = (jax.lax.dynamic_slice_in_dim(k_ids_BS, index * n_queries, n_queries, axis=1), k_ids_BS)
        else:
            ids = (ids[0], k_ids_BS)
    spread = options["causal"] and positions is None and n > 1 and n_queries % 2 == 0
    spread = spread and (options["window"] is None or options["window"] > n_queries)
    if positions is None:
        q_position_T = jnp.arange(n_queries, dtype=jnp.int32) + index * n_queries
        k_position_S = jnp.arange(n * n_queries, dtype=jnp.int32)
        positions = tuple(jnp.broadcast_to(p, (n_batch, p.shape[0])) for p in (q_position_T, k_position_S))
    else:
        positions = (positions[0], gather(positions[1]))
    k_BSKP, v_BSKP = gather(k_BTKP), gather(v_BTKP)
    if not spread:
        return attend(q_BTHP, k_BSKP, v_BSKP, **{**options, "segment_ids": ids, "positions": positions})
    gate = options["gate"]
    swap = lambda array: _swap(array, context_axis, n)
    positions = (swap(positions[0]), positions[1])
    ids = None if ids is None else (swap(ids[0]), ids[1])
    options |= {"segment_ids": ids, "positions": positions, "gate": None}
    out_BTHP = swap(attend(swap(q_BTHP), k_BSKP, v_BSKP, **options))
    return out_BTHP if gate is None else apply_gate(out_BTHP, gate)


def _swap(array, context_axis: str, n: int):
    """[B, T, ...] whose second half is that of the mirrored device; its own inverse."""
    first, second = jnp.split(array, 2, axis=1)
    mirrored = jax.lax.ppermute(second, context_axis, [(i, n - 1 - i) for i in range(n)])
    return jnp.concatenate([first, mirrored], axis=1)
