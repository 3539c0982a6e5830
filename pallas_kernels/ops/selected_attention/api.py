# SPDX-License-Identifier: Apache-2.0
"""Attention of each query to the blocks of keys that were chosen for it (Qwen Team 2026, Qwen Sparse Attention; the
selected branch of Yuan et al. 2025, "Native Sparse Attention", arXiv:2502.11089, section 3.3.2).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.checks import check_array, check_attended, check_shape
from pallas_kernels.op import call
from pallas_kernels.ops.selected_attention import OP


def selected_attention(
    q_BTHP: jax.Array,
    k_BSKP: jax.Array,
    v_BSKP: jax.Array,
    chosen_BTC: jax.Array,
    blocks_BS: jax.Array,
    *,
    places: jax.Array | None = None,
    scale: float | None = None,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """out_t = sum over visible s of softmax_s(scale q_t . k_s) v_s; head h reads k, v h // (H / K).

    Key s is visible to query t if its block is one of those chosen for t, and s <= t. A query without visible keys
    gives exactly 0 and no gradients. Documents are kept apart by blocks that hold keys of one document alone.

    Args:
      q_BTHP: queries, bfloat16, float16, float32 or float64.
      k_BSKP, v_BSKP: keys and values, S of them; K divides H; v may have a width of its own, which the result takes.
      chosen_BTC: int32, numbers of blocks, the same for all heads; negative: none. A number may come more than once.
      blocks_BS: int32, the number of each key's block, below S; negative: of no block, seen by no query.
      places: int32 [B, T], at which key each query stands; None: query t at key t.
      scale: factor of q . k; None is P ** -0.5.
      context_axis: mesh axis over which the tokens, of queries and keys alike, are split in order; to be called inside
        a shard_map over it. Numbers of blocks and places are those of whole rows. Keys and values are gathered; the
        result is this device's share.
      implementation: "auto", "reference" or "xla", which goes through blocks of queries.

    Returns:
      out_BTHP in the dtype of q.

    Scores, softmax statistics and sums are float32 at least. Gradients flow to q, k and v, none to what is chosen.
    Raises ValueError or TypeError for arguments that do not fit together, NotImplementedError where the named
    implementation cannot serve the call.
    """
    check_attended(q_BTHP, k_BSKP, v_BSKP)
    n_batch, n_queries, n_keys = *q_BTHP.shape[:2], k_BSKP.shape[1]
    _check_integers("chosen_BTC", chosen_BTC, (n_batch, n_queries, None), "batch, tokens of q_BTHP, chosen blocks")
    _check_integers("blocks_BS", blocks_BS, (n_batch, n_keys), "batch, keys of k_BSKP")
    if places is not None:
        _check_integers("places", places, (n_batch, n_queries), "batch, tokens of q_BTHP")
        places = jnp.asarray(places, jnp.int32)
    if context_axis is not None:
        if n_queries != n_keys:
            said = f"with {n_queries} queries and {n_keys} keys: must be equal"
            raise ValueError(f"context_axis ({context_axis!r}) {said}")
        context_axis = context_axis if context.axis_size(context_axis) > 1 else None
    args = q_BTHP, k_BSKP, v_BSKP, jnp.asarray(chosen_BTC, jnp.int32), jnp.asarray(blocks_BS, jnp.int32)
    kwargs = {"places": places, "scale": q_BTHP.shape[-1] ** -0.5 if scale is None else float(scale)}
    return call(OP, implementation, args, kwargs, context_axis=context_axis)


def _check_integers(name: str, array, shape: tuple[int | None, ...], what: str) -> None:
    """Raises ValueError or TypeError unless it is an array of integers of the shape."""
    check_array(name, array)
    check_shape(name, array, shape, what)
    if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
        raise TypeError(f"{name} has dtype {jnp.result_type(array)}, expected an integer type")
