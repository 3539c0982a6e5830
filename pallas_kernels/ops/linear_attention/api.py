# SPDX-License-Identifier: Apache-2.0
"""Linear attention with decay: none (Katharopoulos et al. 2020, arXiv:2006.16236), constant (RetNet, Sun et al. 2023,
arXiv:2307.08621; lightning attention), one a token (simple GLA) or one a token and key channel (GLA, Yang et al. 2023,
arXiv:2312.06635; HGRN2, arXiv:2404.07904; RWKV-6, arXiv:2404.05892); Taylor features (Based, Arora et al. 2024,
arXiv:2402.18668).
"""

import jax

from pallas_kernels.checks import (
    check_float,
    check_heads,
    check_log_decays,
    check_positive_int,
    check_segment_ids,
    check_shape,
    check_state,
    rank,
)
from pallas_kernels.op import call
from pallas_kernels.ops.linear_attention import OP
from pallas_kernels.ops.linear_attention.features import FEATURE_MAPS, n_features


def linear_attention(
    q_BTGN: jax.Array,
    k_BTGN: jax.Array,
    v_BTHP: jax.Array,
    g: jax.Array | None = None,
    *,
    bonus: jax.Array | None = None,
    normalizer: bool = False,
    eps: float = 1e-6,
    feature_map: str | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_final_state: bool = False,
    chunk: int | None = None,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """y_t = S_t^T (scale q_t) with S_t = exp(g_t) S_{t-1} + k_t v_t^T, per head; head h reads group h // (H / G).

    Args:
      q_BTGN, k_BTGN: queries and keys of the G groups, bfloat16, float16, float32 or float64; G divides H.
      v_BTHP: values, of the same types.
      g: log decays <= 0, float32: None (none), [H] (constant: log gamma of RetNet), [B, T, H] or [B, T, H, N] (one a
        key channel). -inf forgets everything.
      bonus: [H, N], or None. With it a token reads before it writes and decays, and its own value by these weights,
        y_t = (S_{t-1} + (bonus o k_t) v_t^T)^T (scale q_t), as in RWKV-6.
      normalizer: divide y_t by eps and what the same sum gives for values of 1. The state has a column more, the sum
        of the keys.
      eps: added to the divisor of `normalizer`.
      feature_map: None, or "taylor": weights 1 + s + s^2 / 2 for s = scale q . k, the second order of exp(s). The state
        has 1 + N + N^2 rows then, for 1, k and k k^T, and g is not by channel.
      scale: of the queries; None is N ** -0.5.
      segment_ids: int32 [B, T], or None for one document a row; the contract stands in the package docstring.
      initial_state: float32 [B, H, N, P] (see `normalizer` and `feature_map`), continues the first document of each
        row; None is zeros.
      return_final_state: also return the state after the last real token.
      chunk: tokens a chunk of the chunked implementations; a hint, invisible in the result beyond rounding.
      context_axis: mesh axis over which the tokens are split in order; to be called inside a shard_map over it.
        initial_state and the returned final state are those of the whole rows, the same on all devices of the axis;
        y_BTHP is this device's share.
      implementation: "auto", "reference", "xla", or "gpu" for at most one decay a head; "auto" does not take the last.

    Returns:
      y_BTHP in the dtype of v, or (y_BTHP, final_state_BHNP) with the state in float32 (float64 if an input is).

    Accumulation, decays and states are float32 at least. Gradients flow to every floating-point argument and through
    both results. Raises ValueError or TypeError for arguments that do not fit together, NotImplementedError where the
    named implementation cannot serve the call.
    """
    check_heads(q_BTGN, k_BTGN, v_BTHP)
    (n_batch, n_tokens, n_heads, d_head), d_key = v_BTHP.shape, k_BTGN.shape[-1]
    by_token = v_BTHP.shape[:3]
    legend = "heads of v_BTHP; or batch, tokens, heads; or with the key width"
    check_log_decays("g", g, ((n_heads,), by_token, (*by_token, d_key)), legend)
    _check_features(feature_map, g, bonus)
    if bonus is not None:
        check_shape("bonus", bonus, (n_heads, d_key), "heads of v_BTHP, key width")
        check_float("bonus", bonus)
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, (n_batch, n_tokens), "batch, tokens of v_BTHP")
    shape = (n_batch, n_heads, n_features(feature_map, d_key), d_head + bool(normalizer))
    initial_state = check_state("initial_state", initial_state, shape, "batch, heads, features, head width")
    if chunk is not None:
        check_positive_int("chunk", chunk)
    kwargs = {
        "bonus": bonus,
        "normalizer": normalizer,
        "eps": eps,
        "feature_map": feature_map,
        "scale": d_key**-0.5 if scale is None else scale,
        "segment_ids": segment_ids,
        "initial_state": initial_state,
        "return_final_state": return_final_state,
        "chunk": chunk,
    }
    return call(OP, implementation, (q_BTGN, k_BTGN, v_BTHP, g), kwargs, context_axis=context_axis)


def _check_features(feature_map, g, bonus) -> None:
    """Raises ValueError for features that do not go with the other arguments."""
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map ({feature_map!r}) not one of {', '.join(map(repr, FEATURE_MAPS))}")
    if feature_map is None:
        return
    if bonus is not None:
        raise ValueError(f"bonus and feature_map ({feature_map!r}) cannot be given together")
    if g is not None and rank("g", g) == 4:
        raise ValueError(f"g of shape {list(g.shape)} decays by key channel, feature_map ({feature_map!r}) has others")
