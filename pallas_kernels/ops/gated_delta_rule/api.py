# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule: Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464, eq. 10), Kimi Delta
Attention (Kimi Team 2025, arXiv:2510.26692, eq. 1) and, without decay, DeltaNet (Yang et al. 2024, arXiv:2406.06484).
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
)
from pallas_kernels.op import call
from pallas_kernels.ops.gated_delta_rule import OP


def gated_delta_rule(
    q_BTGN: jax.Array,
    k_BTGN: jax.Array,
    v_BTHP: jax.Array,
    beta_BTH: jax.Array,
    g: jax.Array | None = None,
    *,
    normalize: bool = False,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_final_state: bool = False,
    chunk: int | None = None,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """y_t = S_t^T (scale q_t) with S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T and S' = exp(g_t) S_{t-1}, per head.

    The state decays first; what k_t reads from it is replaced, by the share beta_t, with v_t. Head h reads the queries
    and keys of group h // (H / G).

    Args:
      q_BTGN, k_BTGN: queries and keys of the G groups, bfloat16, float16, float32 or float64; G divides H. With
        beta up to 1 (up to 2) the state stays bounded for keys of length at most 1: see `normalize`.
      v_BTHP: values, of the same types.
      beta_BTH: step sizes in [0, 2], float32. Above 1 what is read changes its sign.
      g: log decays <= 0, float32: [B, T, H], one a head, [B, T, H, N], one a key channel (Kimi Delta Attention), or
        None, no decay (DeltaNet).
      normalize: divide q and k by sqrt(sum of squares + 1e-6) first.
      scale: of the queries; None is N ** -0.5.
      segment_ids: int32 [B, T], or None for one document a row; the contract stands in the package docstring.
      initial_state: float32 [B, H, N, P], continues the first document of each row; None is zeros.
      return_final_state: also return the state after the last real token.
      chunk: tokens a chunk of the chunked implementations; a hint, invisible in the result beyond rounding.
      context_axis: mesh axis over which the tokens are split in order; to be called inside a shard_map over it.
        initial_state and the returned final state are those of the whole rows, the same on all devices of the axis;
        y_BTHP is this device's share.
      implementation: "auto", "reference", "xla", "gpu" (Hopper: bfloat16, N up to 128) or "tpu" (bfloat16 or float32, N
        and P up to 256).

    Returns:
      y_BTHP in the dtype of v, or (y_BTHP, final_state_BHNP) with the state in float32 (float64 if an input is).

    Accumulation, decays and states are float32 at least. Gradients flow to every floating-point argument and through
    both results. Raises ValueError or TypeError for arguments that do not fit together, NotImplementedError where the
    named implementation cannot serve the call.
    """
    check_heads(q_BTGN, k_BTGN, v_BTHP)
    (n_batch, n_tokens, n_heads, d_head), d_key = v_BTHP.shape, k_BTGN.shape[-1]
    check_shape("beta_BTH", beta_BTH, v_BTHP.shape[:3], "batch, tokens, heads of v_BTHP")
    check_float("beta_BTH", beta_BTH, minimum_bits=32)
    shapes = (v_BTHP.shape[:3], (*v_BTHP.shape[:3], d_key))
    check_log_decays("g", g, shapes, "batch, tokens, heads of v_BTHP; or with the key width")
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, (n_batch, n_tokens), "batch, tokens of v_BTHP")
    legend = "batch, heads, key width, head width"
    initial_state = check_state("initial_state", initial_state, (n_batch, n_heads, d_key, d_head), legend)
    if chunk is not None:
        check_positive_int("chunk", chunk)
    kwargs = {
        "normalize": normalize,
        "scale": d_key**-0.5 if scale is None else scale,
        "segment_ids": segment_ids,
        "initial_state": initial_state,
        "return_final_state": return_final_state,
        "chunk": chunk,
    }
    return call(OP, implementation, (q_BTGN, k_BTGN, v_BTHP, beta_BTH, g), kwargs, context_axis=context_axis)
