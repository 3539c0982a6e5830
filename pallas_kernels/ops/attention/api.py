# SPDX-License-Identifier: Apache-2.0
"""Softmax attention with grouped keys, windows, documents and an output gate (Qiu et al. 2025, arXiv:2505.06708)."""

import math
import numbers

import jax
import jax.numpy as jnp

from pallas_kernels import context, segments
from pallas_kernels.checks import (
    check_array,
    check_attended,
    check_float,
    check_positive_int,
    check_shape,
    check_sides,
    rank,
)
from pallas_kernels.op import call
from pallas_kernels.ops.attention import OP


def attention(
    q_BTHP: jax.Array,
    k_BSKP: jax.Array,
    v_BSKP: jax.Array,
    *,
    gate: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    positions: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
    layer: int | jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    q_wide: jax.Array | None = None,
    kv: jax.Array | None = None,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """out_t = sigmoid(gate_t) * sum over visible s of softmax_s(scale q_t . k_s) v_s; head h reads k, v h // (H / K).

    Key s is visible to query t if both belong to one document, neither is padding, position t >= position s (causal)
    and position t - position s < window. A query without visible keys gives exactly 0 and no gradients.

    Args:
      q_BTHP: queries, bfloat16, float16, float32 or float64.
      k_BSKP, v_BSKP: keys and values, S of them; K divides H; v may have a width of its own, which the result takes.
      gate: pre-activation of the output gate, [B, T, H, P of v] or [B, T, H], or None.
      causal, window: masks over positions; a window of w sees its own position and the w - 1 before.
      segment_ids: int32 [B, T] for both sides (then T == S), where a change of id between real tokens starts a
        document, so that an id that comes back is another one; or a pair [B, T], [B, S], where equal ids are one
        document in any order; None is one document.
      positions: int32 like segment_ids; None counts tokens from 0, queries from q_offset.
      scale, softcap: factor of q . k, default P ** -0.5; scores become softcap * tanh(scores / softcap).
      sinks: [H] float, one more logit a head in the softmax's denominator.
      q_offset: position of the first query among the keys where positions is None: an int, or an int32 scalar or [B].
      layer: the entry to read of k_BSKP and v_BSKP, which then are stacked caches [L, B, S, K, P]: the kernel for few
        queries reads it where it lies. Not with context_axis.
      k_scale, v_scale: [B, K, S], with layer [L, B, K, S], of int8 k_BSKP and v_BSKP, which stand for k_BSKP[b, s, k] *
        k_scale[b, k, s]. By reference and xla, in blocks; without gradients, and not with context_axis.
      q_wide: q in float32, which is not read: where the kernel for GPUs serves, and no tokens are split, the gradient
        of q goes to it, as it was added up, and none to q.
      kv: [B, S, 2 K, P], its last K heads v_BSKP, the others not read: where that kernel serves, it reads v_BSKP there,
        and the gradients of k_BSKP and v_BSKP go to it, side by side, and not to them.
      context_axis: mesh axis over which the tokens, of queries and keys alike, are split in order, inside a shard_map
        over it. The result is this device's share of that of the whole rows. Not with q_offset.
      implementation: "auto", "reference", "xla", "tpu" or "gpu".

    Returns:
      out_BTHP in the dtype of q.

    Scores, softmax statistics and sums are float32 at least. Gradients flow to q, k, v, gate and sinks. Raises
    ValueError or TypeError for arguments that do not fit together, NotImplementedError where the named implementation
    cannot serve. Forward mode (jax.jvp) goes through reference alone; of xla its gradient can be differentiated so.
    """
    check_shape("q_BTHP", q_BTHP, (None,) * 4, "batch, tokens, heads, head width")
    scales = _scales(k_BSKP, v_BSKP, k_scale, v_scale, layer, context_axis)
    k_BSKP, v_BSKP, scales, stacked = _entries(k_BSKP, v_BSKP, scales, layer, context_axis)
    _check(q_BTHP, k_BSKP, v_BSKP, gate, sinks, window, bool(scales), q_wide, kv)
    sizes = *q_BTHP.shape[:2], k_BSKP.shape[1]
    context_axis = _context_axis(context_axis, sizes[1], sizes[2], q_offset)
    pair, one_side = _documents(segment_ids, sizes, context_axis)
    kwargs = {
        "gate": gate,
        "causal": bool(causal),
        "window": window,
        "segment_ids": pair,
        "positions": check_sides("positions", positions, *sizes),
        "scale": q_BTHP.shape[3] ** -0.5 if scale is None else _finite("scale", scale),
        "softcap": None if softcap is None else _finite("softcap", softcap, positive=True),
        "sinks": sinks,
        "q_offset": _offset(q_offset, sizes[0], positions),
        **scales,
    }
    offered: dict = {"stacked": stacked} | ({"q_wide": q_wide, "kv": kv} if context_axis is None else {})
    more: dict = {"offered": offered, "context_axis": context_axis, "context_options": {"one_side": one_side}}
    return call(OP, implementation, (q_BTHP, k_BSKP, v_BSKP), kwargs, **more)


def _documents(segment_ids, sizes: tuple, context_axis: str | None) -> tuple:
    """(ids of both sides or None, whether they were given as one)."""
    pair = check_sides("segment_ids", segment_ids, *sizes)
    one_side = pair is not None and not isinstance(segment_ids, (tuple, list))
    return ((segments.document_ids(pair[0]),) * 2 if one_side and context_axis is None else pair), one_side


def _check(q_BTHP, k_BSKP, v_BSKP, gate, sinks, window, in_int8: bool, q_wide, kv) -> None:
    """Raises ValueError or TypeError unless they fit together."""
    check_attended(q_BTHP, k_BSKP, v_BSKP, in_int8)
    n_batch, n_queries, n_heads, _ = q_BTHP.shape
    if gate is not None:
        full = (n_batch, n_queries, n_heads, v_BSKP.shape[3])
        check_shape(
            "gate", gate, full[:3] if rank("gate", gate) == 3 else full, "batch, tokens, heads[, width of v_BSKP]"
        )
        check_float("gate", gate)
    if sinks is not None:
        check_shape("sinks", sinks, (n_heads,), "heads of q_BTHP")
        check_float("sinks", sinks)
    if window is not None:
        check_positive_int("window", window)
    if q_wide is not None:
        check_shape("q_wide", q_wide, q_BTHP.shape, "as q_BTHP")
    if kv is not None:
        rows, keys, heads, width = k_BSKP.shape
        check_shape("kv", kv, (rows, keys, 2 * heads, width), "batch, keys, twice the key heads, width of k_BSKP")
        check_shape("v_BSKP", v_BSKP, k_BSKP.shape, "as k_BSKP, where kv is given")


def _scales(k, v, k_scale, v_scale, layer, context_axis: str | None) -> dict[str, jax.Array]:
    """Both scales by name, checked; {} where neither is given."""
    if k_scale is None and v_scale is None:
        return {}
    given = {"k_scale": k_scale, "v_scale": v_scale}
    axes, stack = ((), "") if layer is None else ((None,), "layers, ")
    for (name, scale), of, array in zip(given.items(), ("k_BSKP", "v_BSKP"), (k, v), strict=True):
        if scale is None:
            raise ValueError(f"{name} is None, the other scale is not: give both or none")
        check_shape(of, array, (*axes, *[None] * 4), f"{stack}batch, keys, key heads, width")
        if array.dtype != jnp.int8:
            raise TypeError(f"{of} has dtype {array.dtype}, expected int8, as {name} is given")
        *rows, slots, heads, _ = array.shape
        check_shape(name, scale, (*rows, heads, slots), f"{stack}batch, heads, keys of {of}")
        check_float(name, scale)
    if context_axis is not None:
        raise ValueError(f"context_axis ({context_axis!r}) and k_scale cannot be given together")
    return given


def _entries(k, v, scales: dict, layer, context_axis: str | None) -> tuple:
    """(keys, values and scales of the layer, what `_stacked` gives); as they are, and None, without one."""
    if layer is None:
        return k, v, scales, None
    stacked = _stacked(k, v, layer, context_axis)
    entry = lambda array: jax.lax.dynamic_index_in_dim(array, stacked[2], keepdims=False)
    return *jax.tree.map(entry, (*stacked[:2], scales)), stacked


def _stacked(k_LBSKP, v_LBSKP, layer, context_axis: str | None) -> tuple:
    """(k, v, layer as an int32 scalar), checked."""
    check_array("k_BSKP", k_LBSKP)
    for name, array in (("k_BSKP", k_LBSKP), ("v_BSKP", v_LBSKP)):
        check_shape(name, array, (*k_LBSKP.shape[:1], *[None] * 4), "layers, as layer is given, batch, keys, ...")
    if context_axis is not None:
        raise ValueError(f"context_axis ({context_axis!r}) and layer ({layer!r}) cannot be given together")
    n_layers = k_LBSKP.shape[0]
    if isinstance(layer, numbers.Integral) and not 0 <= int(layer) < n_layers:
        raise ValueError(f"layer ({layer}) outside of the layers of k_BSKP ({n_layers})")
    index = jnp.asarray(layer)
    if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"layer ({layer!r}) is neither an int nor an integer scalar")
    return k_LBSKP, v_LBSKP, jnp.clip(index.astype(jnp.int32), 0, n_layers - 1)


def _context_axis(context_axis: str | None, n_queries: int, n_keys: int, q_offset) -> str | None:
    """The axis, checked; None where it does not split anything."""
    if context_axis is None:
        return None
    n_devices = context.axis_size(context_axis)
    if n_queries != n_keys:
        raise ValueError(f"context_axis ({context_axis!r}) with {n_queries} queries and {n_keys} keys: must be equal")
    if not isinstance(q_offset, int) or q_offset != 0:
        raise ValueError(f"context_axis ({context_axis!r}) and q_offset ({q_offset!r}) cannot be given together")
    return context_axis if n_devices > 1 else None


def _finite(name: str, value, positive: bool = False) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} ({value!r}) is not a Python number")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name} ({value}) not {'positive and ' if positive else ''}finite")
    return float(value)


def _offset(q_offset, n_batch: int, positions):
    if isinstance(q_offset, numbers.Integral) and not isinstance(q_offset, bool):
        if positions is not None and q_offset != 0:
            raise ValueError(f"q_offset ({q_offset}) given beside positions, which replace it")
        return int(q_offset)
    if not hasattr(q_offset, "dtype") or not jnp.issubdtype(q_offset.dtype, jnp.integer):
        raise TypeError(f"q_offset ({q_offset!r}) is neither an int nor an integer array")
    if positions is not None:
        raise ValueError("q_offset (an array) given beside positions, which replace it")
    if q_offset.ndim:
        check_shape("q_offset", q_offset, (n_batch,), "batch of q_BTHP; or a scalar")
    return q_offset.astype(jnp.int32)
