# SPDX-License-Identifier: Apache-2.0
"""The gated delta product: several delta updates a token (Siems et al. 2025, arXiv:2502.10297, eq. 4 and 6)."""

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
from pallas_kernels.ops.gated_delta_product import OP


def gated_delta_product(
    q_BTGN: jax.Array,
    k_BTRGN: jax.Array,
    v_BTRHP: jax.Array,
    beta_BTRH: jax.Array,
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
    """`gated_delta_rule` with R updates a token: one decay, R keys and values one after the other, one read.

    S_t = S_R with S_0 = exp(g_t) S_{t-1} and S_r = S_{r-1} + k_tr (beta_tr (v_tr - S_{r-1}^T k_tr))^T;
    y_t = S_t^T (scale q_t), per head; head h reads group h // (H / G).

    Args:
      q_BTGN: queries of the G groups, bfloat16, float16, float32 or float64; G divides H.
      k_BTRGN, v_BTRHP: keys and values of the R updates, of the same types.
      beta_BTRH: step sizes in [0, 2], float32.
      g: log decays <= 0, float32: [B, T, H], one a head, [B, T, H, N], one a key channel, or None, no decay.
      normalize: divide q and k by sqrt(sum of squares + 1e-6) first.
      scale: of the queries; None is N ** -0.5.
      segment_ids: int32 [B, T], or None for one document a row; the contract stands in the package docstring.
      initial_state: float32 [B, H, N, P], continues the first document of each row; None is zeros.
      return_final_state: also return the state after the last real token.
      chunk: updates a chunk of the chunked implementations; a hint, invisible in the result beyond rounding.
      context_axis: mesh axis over which the tokens are split in order; see `gated_delta_rule`.
      implementation: "auto", "reference", "xla" or "gpu" (the Hopper kernels of `gated_delta_rule`: bfloat16, N up to
        128).

    Returns:
      y_BTHP in the dtype of v, or (y_BTHP, final_state_BHNP) with the state in float32 (float64 if an input is).

    Gradients flow to every floating-point argument and through both results. Raises ValueError or TypeError for
    arguments that do not fit together, NotImplementedError where the named implementation cannot serve the call.
    """
    check_shape("v_BTRHP", v_BTRHP, (None,) * 5, "batch, tokens, updates, heads, head width")
    n_batch, n_tokens, n_updates, n_heads, d_head = v_BTRHP.shape
    if n_updates < 1:
        raise ValueError(f"v_BTRHP has {n_updates} updates a token, at least 1 is needed")
    legend = "batch, tokens, updates of v_BTRHP, groups, key width"
    check_shape("k_BTRGN", k_BTRGN, (*v_BTRHP.shape[:3], None, None), legend)
    check_heads(q_BTGN, k_BTRGN[:, :, 0], v_BTRHP[:, :, 0], ("q_BTGN", "k_BTRGN of one update", "v_BTRHP"))
    check_shape("beta_BTRH", beta_BTRH, v_BTRHP.shape[:4], "batch, tokens, updates, heads of v_BTRHP")
    check_float("beta_BTRH", beta_BTRH, minimum_bits=32)
    d_key, by_head = k_BTRGN.shape[-1], (n_batch, n_tokens, n_heads)
    check_log_decays("g", g, (by_head, (*by_head, d_key)), "batch, tokens, heads of v_BTRHP; or with the key width")
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, (n_batch, n_tokens), "batch, tokens of v_BTRHP")
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
    return call(OP, implementation, (q_BTGN, k_BTRGN, v_BTRHP, beta_BTRH, g), kwargs, context_axis=context_axis)
