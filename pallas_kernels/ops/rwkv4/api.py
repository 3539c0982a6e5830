# SPDX-License-Identifier: Apache-2.0
"""The weighted mean of RWKV-4 (Peng et al. 2023, arXiv:2305.13048, eq. 16 and appendix D)."""

import jax

from pallas_kernels.checks import check_float, check_segment_ids, check_shape, check_states
from pallas_kernels.op import call
from pallas_kernels.ops.rwkv4 import OP


def rwkv4(
    k_BTD: jax.Array,
    v_BTD: jax.Array,
    g_D: jax.Array,
    bonus_D: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    initial_a: jax.Array | None = None,
    initial_b: jax.Array | None = None,
    initial_m: jax.Array | None = None,
    return_final_state: bool = False,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """y_t = (A_{t-1} + exp(bonus + k_t) v_t) / (B_{t-1} + exp(bonus + k_t)), per channel.

    A_t = exp(g) A_{t-1} + exp(k_t) v_t and B_t = exp(g) B_{t-1} + exp(k_t). They are kept as a = A exp(-m) and b = B
    exp(-m), where m_t = max(m_{t-1} + g, k_t), so that no exponential overflows; m means nothing where b = 0.

    Args:
      k_BTD, v_BTD: keys and values, bfloat16, float16, float32 or float64.
      g_D: log decays <= 0, float32; the published weights w are their logarithms, g = -exp(w).
      bonus_D: u, added to a token's own key, floating point.
      segment_ids: int32 [B, T], or None for one document a row; the contract stands in the package docstring.
      initial_a, initial_b, initial_m: float32 [B, D], all or none; they continue the first document of each row.
      return_final_state: also return a, b and m after the last real token.
      context_axis: mesh axis over which the tokens are split in order; to be called inside a shard_map over it.
        Initial and final states are those of the whole rows, the same on all devices of the axis; y_BTD is this
        device's share.
      implementation: "auto", "reference" or "xla".

    Returns:
      y_BTD in the dtype of v, or (y_BTD, a_BD, b_BD, m_BD) with states in float32 (float64 if an input is).

    Gradients flow to every floating-point argument and through all results. Raises ValueError or TypeError for
    arguments that do not fit together, NotImplementedError where the named implementation cannot serve the call.
    """
    check_shape("v_BTD", v_BTD, (None,) * 3, "batch, tokens, channels")
    n_batch, n_tokens, n_channels = v_BTD.shape
    if n_tokens < 1:
        raise ValueError(f"v_BTD has {n_tokens} tokens, at least 1 is needed")
    check_shape("k_BTD", k_BTD, v_BTD.shape, "shape of v_BTD")
    for name, array, bits in (("k_BTD", k_BTD, 16), ("v_BTD", v_BTD, 16), ("g_D", g_D, 32), ("bonus_D", bonus_D, 16)):
        check_float(name, array, minimum_bits=bits)
    check_shape("g_D", g_D, (n_channels,), "channels of v_BTD")
    check_shape("bonus_D", bonus_D, (n_channels,), "channels of v_BTD")
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, (n_batch, n_tokens), "batch, tokens of v_BTD")
    states = {"initial_a": initial_a, "initial_b": initial_b, "initial_m": initial_m}
    shape, legend = (n_batch, n_channels), "batch, channels of v_BTD"
    states = check_states({name: (state, shape, legend) for name, state in states.items()})
    kwargs = {"segment_ids": segment_ids, **states, "return_final_state": return_final_state}
    return call(OP, implementation, (k_BTD, v_BTD, g_D, bonus_D), kwargs, context_axis=context_axis)
