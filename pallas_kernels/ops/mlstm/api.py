# SPDX-License-Identifier: Apache-2.0
"""The matrix memory of xLSTM with stabilised exponential gates (Beck et al. 2024, arXiv:2405.04517, eq. 19 to 27)."""

import jax

from pallas_kernels.checks import (
    check_float,
    check_heads,
    check_positive_int,
    check_segment_ids,
    check_shape,
    check_states,
)
from pallas_kernels.op import call
from pallas_kernels.ops.mlstm import OP


def mlstm(
    q_BTGN: jax.Array,
    k_BTGN: jax.Array,
    v_BTHP: jax.Array,
    i_BTH: jax.Array,
    f_BTH: jax.Array,
    *,
    eps: float = 1e-6,
    segment_ids: jax.Array | None = None,
    initial_c: jax.Array | None = None,
    initial_n: jax.Array | None = None,
    initial_m: jax.Array | None = None,
    return_final_state: bool = False,
    chunk: int | None = None,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """h_t = C_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + eps), per head; head h reads group h // (H / G).

    C_t = f' C_{t-1} + i' k_t v_t^T / sqrt(N) and n_t = f' n_{t-1} + i' k_t / sqrt(N), with f' = exp(log sigmoid(f_t) +
    m_{t-1} - m_t), i' = exp(i_t - m_t) and m_t = max(log sigmoid(f_t) + m_{t-1}, i_t). m keeps all exponentials at most
    1 and cancels from h but for eps.

    Args:
      q_BTGN, k_BTGN: queries and keys of the G groups, bfloat16, float16, float32 or float64; G divides H.
      v_BTHP: values, of the same types.
      i_BTH, f_BTH: gates before their exponential and sigmoid, float32. A soft cap, as in xLSTM 7B, is the caller's.
      eps: added to the divisor.
      segment_ids: int32 [B, T], or None for one document a row; the contract stands in the package docstring.
      initial_c, initial_n, initial_m: float32 [B, H, N, P], [B, H, N], [B, H], all or none; they continue the first
        document of each row. Without, and in all other documents, zeros, m included.
      return_final_state: also return c, n and m after the last real token.
      chunk: tokens a chunk of the chunked implementations; a hint, invisible in the result beyond rounding.
      context_axis: mesh axis over which the tokens are split in order; to be called inside a shard_map over it.
        Initial and final states are those of the whole rows, the same on all devices of the axis; h_BTHP is this
        device's share.
      implementation: "auto", "reference" or "xla".

    Returns:
      h_BTHP in the dtype of v, or (h_BTHP, c_BHNP, n_BHN, m_BH) with states in float32 (float64 if an input is).

    Accumulation, gates and states are float32 at least. Gradients flow to every floating-point argument and through all
    results. Raises ValueError or TypeError for arguments that do not fit together, NotImplementedError where the named
    implementation cannot serve the call.
    """
    check_heads(q_BTGN, k_BTGN, v_BTHP)
    (n_batch, n_tokens, n_heads, d_head), d_key = v_BTHP.shape, k_BTGN.shape[-1]
    for name, array in (("i_BTH", i_BTH), ("f_BTH", f_BTH)):
        check_shape(name, array, v_BTHP.shape[:3], "batch, tokens, heads of v_BTHP")
        check_float(name, array, minimum_bits=32)
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, (n_batch, n_tokens), "batch, tokens of v_BTHP")
    sizes = {"batch": n_batch, "heads": n_heads, "key width": d_key, "head width": d_head}
    shape = lambda rank: (tuple(sizes.values())[:rank], ", ".join(tuple(sizes)[:rank]))
    states = {"initial_c": (initial_c, *shape(4)), "initial_n": (initial_n, *shape(3))}
    states = check_states(states | {"initial_m": (initial_m, *shape(2))})
    if chunk is not None:
        check_positive_int("chunk", chunk)
    kwargs = {
        "eps": eps,
        "segment_ids": segment_ids,
        **states,
        "return_final_state": return_final_state,
        "chunk": chunk,
    }
    return call(OP, implementation, (q_BTGN, k_BTGN, v_BTHP, i_BTH, f_BTH), kwargs, context_axis=context_axis)
