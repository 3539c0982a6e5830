# SPDX-License-Identifier: Apache-2.0
"""The gated linear recurrence of each channel: RG-LRU (Griffin, De et al. 2024, arXiv:2402.19427, eq. 4), HGRN (Qin et
al. 2023, arXiv:2311.04823), minGRU and minLSTM (Feng et al. 2024, arXiv:2410.01201).
"""

import jax

from pallas_kernels.checks import check_float, check_segment_ids, check_shape, check_state
from pallas_kernels.op import call
from pallas_kernels.ops.linear_scan import OP


def linear_scan(
    x_BTD: jax.Array,
    g_BTD: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_final_state: bool = False,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """h_t = exp(g_t) h_{t-1} + x_t, per channel.

    The gates are the caller's: RG-LRU has g = -8 r softplus(Lambda) and x = sqrt(1 - exp(2 g)) i u, at a document's
    first token x = i u; HGRN g = log f, x = (1 - f) silu(i); minGRU g = log(1 - z), x = z c; minLSTM g = log(f / (f +
    i)), x = i / (f + i) c. Log decays hold what a product of gates near 1 would lose.

    Args:
      x_BTD: inputs, bfloat16, float16, float32 or float64.
      g_BTD: log decays, <= 0 or -inf, float32.
      segment_ids: int32 [B, T], or None for one document a row; the contract stands in the package docstring.
      initial_state: float32 [B, D], continues the first document of each row; None is zeros.
      return_final_state: also return the state after the last real token.
      context_axis: mesh axis over which the tokens are split in order; to be called inside a shard_map over it.
        initial_state and the returned final state are those of the whole rows, the same on all devices of the axis;
        h_BTD is this device's share.
      implementation: "auto", "reference" or "xla".

    Returns:
      h_BTD in the dtype of x, or (h_BTD, final_state_BD) with the state in float32 (float64 if x or g is).

    Accumulation, decays and states are float32 at least. Gradients flow to every floating-point argument and through
    both results. Raises ValueError or TypeError for arguments that do not fit together, NotImplementedError where the
    named implementation cannot serve the call. Forward mode (jax.jvp) goes through reference alone; of xla its gradient
    can be differentiated so.
    """
    check_shape("x_BTD", x_BTD, (None,) * 3, "batch, tokens, channels")
    n_batch, n_tokens, n_channels = x_BTD.shape
    if n_tokens < 1:
        raise ValueError(f"x_BTD has {n_tokens} tokens, at least 1 is needed")
    check_shape("g_BTD", g_BTD, x_BTD.shape, "shape of x_BTD")
    check_float("x_BTD", x_BTD)
    check_float("g_BTD", g_BTD, minimum_bits=32)
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, (n_batch, n_tokens), "batch, tokens of x_BTD")
    initial_state = check_state("initial_state", initial_state, (n_batch, n_channels), "batch, channels of x_BTD")
    kwargs = {
        "segment_ids": segment_ids,
        "initial_state": initial_state,
        "return_final_state": return_final_state,
    }
    return call(OP, implementation, (x_BTD, g_BTD), kwargs, context_axis=context_axis)
