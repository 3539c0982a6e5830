# SPDX-License-Identifier: Apache-2.0
"""The generalised delta rule of RWKV-7 (Peng et al. 2025, arXiv:2503.14456, eq. 17): diagonal plus rank one."""

import jax

from pallas_kernels.checks import (
    check_float,
    check_heads,
    check_positive_int,
    check_segment_ids,
    check_shape,
    check_state,
)
from pallas_kernels.op import call
from pallas_kernels.ops.rwkv7 import OP


def rwkv7(
    r_BTHN: jax.Array,
    g_BTHN: jax.Array,
    k_BTHN: jax.Array,
    v_BTHP: jax.Array,
    a_BTHN: jax.Array,
    b_BTHN: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_final_state: bool = False,
    chunk: int | None = None,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """y_t = S_t^T r_t with S_t = diag(exp(g_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T, per head.

    What a_t reads, from the state before its decay, is written back to b_t. In RWKV-7 a is minus the key of unit
    length, b that key times the learning rate, and a bonus (r . (k o r_k)) v is added outside.

    Args:
      r_BTHN, k_BTHN, a_BTHN, b_BTHN: receptances, keys, removal and replacement keys, bfloat16, float16, float32 or
        float64.
      g_BTHN: log decays <= 0, one a key channel, float32. Other code calls their logarithm w: exp(g) = exp(-exp(w)).
      v_BTHP: values.
      segment_ids: int32 [B, T], or None for one document a row; the contract stands in the package docstring.
      initial_state: float32 [B, H, N, P], continues the first document of each row; None is zeros. The original code
        keeps the transpose.
      return_final_state: also return the state after the last real token.
      chunk: tokens a chunk of the chunked implementations; a hint, invisible in the result beyond rounding.
      context_axis: mesh axis over which the tokens are split in order; to be called inside a shard_map over it.
        initial_state and the returned final state are those of the whole rows, the same on all devices of the axis;
        y_BTHP is this device's share.
      implementation: "auto", "reference" or "xla".

    Returns:
      y_BTHP in the dtype of v, or (y_BTHP, final_state_BHNP) with the state in float32 (float64 if an input is).

    Accumulation, decays and states are float32 at least. Gradients flow to every floating-point argument and through
    both results. Raises ValueError or TypeError for arguments that do not fit together, NotImplementedError where the
    named implementation cannot serve the call.
    """
    check_heads(r_BTHN, k_BTHN, v_BTHP, ("r_BTHN", "k_BTHN", "v_BTHP"))
    (n_batch, n_tokens, n_heads, d_head), d_key = v_BTHP.shape, k_BTHN.shape[-1]
    for name, array in (("r_BTHN", r_BTHN), ("g_BTHN", g_BTHN), ("a_BTHN", a_BTHN), ("b_BTHN", b_BTHN)):
        check_shape(name, array, (n_batch, n_tokens, n_heads, d_key), "batch, tokens, heads of v_BTHP, width of k_BTHN")
        check_float(name, array, minimum_bits=32 if name == "g_BTHN" else 16)
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, (n_batch, n_tokens), "batch, tokens of v_BTHP")
    legend = "batch, heads, key width, head width"
    initial_state = check_state("initial_state", initial_state, (n_batch, n_heads, d_key, d_head), legend)
    if chunk is not None:
        check_positive_int("chunk", chunk)
    kwargs = {
        "segment_ids": segment_ids,
        "initial_state": initial_state,
        "return_final_state": return_final_state,
        "chunk": chunk,
    }
    args = (r_BTHN, g_BTHN, k_BTHN, v_BTHP, a_BTHN, b_BTHN)
    return call(OP, implementation, args, kwargs, context_axis=context_axis)
