# SPDX-License-Identifier: Apache-2.0
"""Attention whose scores have a term that depends on the query and on the distance alone (Thinking Machines 2026,
Inkling; the position bias of Shaw et al. 2018, arXiv:1803.02155, as profiles that a query mixes).
"""

import jax

from pallas_kernels import context
from pallas_kernels.checks import check_attended, check_float, check_positive_int, check_shape, check_sides
from pallas_kernels.op import call
from pallas_kernels.ops.relative_attention import OP
from pallas_kernels.segments import document_ids, real_positions


def relative_attention(
    q_BTHP: jax.Array,
    k_BSKP: jax.Array,
    v_BSKP: jax.Array,
    r_BTHR: jax.Array,
    profiles_RE: jax.Array,
    *,
    window: int | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    positions: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """out_t = sum over visible s of softmax_s(scale q_t . k_s + b(t, s)) v_s, b(t, s) = r_t . profiles[:, d] for the
    distance d = position t - position s < E, 0 from E on; head h reads k, v h // (H / K).

    Key s is visible to query t if both belong to one document, neither is padding, d >= 0 and d < window. A query
    without visible keys gives exactly 0 and no gradients.

    Args:
      q_BTHP: queries, bfloat16, float16, float32 or float64.
      k_BSKP, v_BSKP: keys and values, S of them; K divides H; v may have a width of its own, which the result takes.
      r_BTHR: how much of each profile a query takes, floating point.
      profiles_RE: by distance, from the query's own position on, floating point.
      window: a window of w sees its own position and the w - 1 before; None: all before.
      segment_ids: int32 [B, T] for both sides (then T == S), where a change of id between real tokens starts a
        document; or a pair [B, T], [B, S], where equal ids are one document in any order; None is one document.
      positions: int32 like segment_ids; None counts tokens from 0: real ones where segment_ids is one array, all of
        them where it is a pair or None, which is faster.
      scale: factor of q . k; None is P ** -0.5.
      context_axis: mesh axis over which the tokens, of queries and keys alike, are split in order; to be called inside
        a shard_map over it. Keys and values are gathered; the result is this device's share.
      implementation: "auto", "reference" or "xla", which goes through blocks of queries.

    Returns:
      out_BTHP in the dtype of q.

    Scores, softmax statistics and sums are float32 at least. Gradients flow to every floating-point argument. Raises
    ValueError or TypeError for arguments that do not fit together, NotImplementedError where the named implementation
    cannot serve the call.
    """
    _check(q_BTHP, k_BSKP, v_BSKP, r_BTHR, profiles_RE)
    if window is not None:
        check_positive_int("window", window)
    sizes = q_BTHP.shape[0], q_BTHP.shape[1], k_BSKP.shape[1]
    pair = check_sides("segment_ids", segment_ids, *sizes)
    one_side = pair is not None and not isinstance(segment_ids, tuple | list)
    if context_axis is not None:
        if sizes[1] != sizes[2]:
            said = f"with {sizes[1]} queries and {sizes[2]} keys: must be equal"
            raise ValueError(f"context_axis ({context_axis!r}) {said}")
        context_axis = context_axis if context.axis_size(context_axis) > 1 else None
    positions = check_sides("positions", positions, *sizes)
    if one_side and context_axis is None:
        positions = (real_positions(pair[0]),) * 2 if positions is None else positions
        pair = (document_ids(pair[0]),) * 2
    kwargs = {
        "window": window,
        "segment_ids": pair,
        "positions": positions,
        "scale": q_BTHP.shape[-1] ** -0.5 if scale is None else float(scale),
    }
    args, more = (q_BTHP, k_BSKP, v_BSKP, r_BTHR, profiles_RE), {"one_side": one_side}
    return call(OP, implementation, args, kwargs, context_axis=context_axis, context_options=more)


def _check(q_BTHP, k_BSKP, v_BSKP, r_BTHR, profiles_RE) -> None:
    """Raises ValueError or TypeError unless they fit together."""
    check_attended(q_BTHP, k_BSKP, v_BSKP)
    n_batch, n_queries, n_heads = q_BTHP.shape[:3]
    check_shape("r_BTHR", r_BTHR, (n_batch, n_queries, n_heads, None), "batch, tokens, heads of q_BTHP, profiles")
    check_shape("profiles_RE", profiles_RE, (r_BTHR.shape[3], None), "profiles of r_BTHR, distances")
    if profiles_RE.shape[1] < 1:
        raise ValueError(f"profiles_RE has {profiles_RE.shape[1]} distances, at least 1 is needed")
    for name, array in {"r_BTHR": r_BTHR, "profiles_RE": profiles_RE}.items():
        check_float(name, array)
