# SPDX-License-Identifier: Apache-2.0
"""The scalar memory of xLSTM with memory mixing (Beck et al. 2024, arXiv:2405.04517, eq. 8 to 17)."""

import jax

from pallas_kernels.checks import check_float, check_segment_ids, check_shape, check_states
from pallas_kernels.op import call
from pallas_kernels.ops.slstm import OP

GATES = ("i", "f", "z", "o")


def slstm(
    x_BTGHP: jax.Array,
    R_HGPP: jax.Array,
    b_GHP: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    initial_y: jax.Array | None = None,
    initial_c: jax.Array | None = None,
    initial_n: jax.Array | None = None,
    initial_m: jax.Array | None = None,
    return_final_state: bool = False,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, ...]:
    """y_t = sigmoid(o) c_t / n_t with c_t = f' c_{t-1} + i' tanh(z) and n_t = f' n_{t-1} + i', per channel.

    The gates (i, f, z, o) = x_t + R y_{t-1} + b read the head's output before, which makes the op sequential. f' =
    exp(log sigmoid(f) + m_{t-1} - m_t) and i' = exp(i - m_t) with m_t = max(log sigmoid(f) + m_{t-1}, i), and m_t = i
    where n_{t-1} = 0, as at a document's first token.

    Args:
      x_BTGHP: projections of the G = 4 gates, in the order i, f, z, o; bfloat16, float16, float32 or float64.
      R_HGPP: recurrent weights of each head, [H, 4, out, in], floating point.
      b_GHP: biases, floating point, or None.
      segment_ids: int32 [B, T], or None for one document a row; the contract stands in the package docstring.
      initial_y, initial_c, initial_n, initial_m: float32 [B, H, P], all or none; they continue the first document of
        each row. Without, and in all other documents, zeros.
      return_final_state: also return y, c, n and m after the last real token.
      context_axis: mesh axis over which the tokens are split in order; to be called inside a shard_map over it. The
        recurrence has no shorter way: devices take turns. Initial and final states are those of the whole rows, the
        same on all devices of the axis; y_BTHP is this device's share.
      implementation: "auto", "reference" or "xla".

    Returns:
      y_BTHP in the dtype of x, or (y_BTHP, y_BHP, c_BHP, n_BHP, m_BHP) with states in float32 (float64 if an input is).

    Gates and states are float32 at least. Gradients flow to every floating-point argument and through all results.
    Raises ValueError or TypeError for arguments that do not fit together, NotImplementedError where the named
    implementation cannot serve the call.
    """
    check_shape("x_BTGHP", x_BTGHP, (None, None, len(GATES), None, None), "batch, tokens, 4 gates, heads, head width")
    n_batch, n_tokens, n_gates, n_heads, d_head = x_BTGHP.shape
    if n_tokens < 1:
        raise ValueError(f"x_BTGHP has {n_tokens} tokens, at least 1 is needed")
    check_shape("R_HGPP", R_HGPP, (n_heads, n_gates, d_head, d_head), "heads, gates of x_BTGHP, width out, width in")
    check_float("x_BTGHP", x_BTGHP)
    check_float("R_HGPP", R_HGPP)
    if b_GHP is not None:
        check_shape("b_GHP", b_GHP, (n_gates, n_heads, d_head), "gates, heads, head width of x_BTGHP")
        check_float("b_GHP", b_GHP)
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, (n_batch, n_tokens), "batch, tokens of x_BTGHP")
    states = {"initial_y": initial_y, "initial_c": initial_c, "initial_n": initial_n, "initial_m": initial_m}
    shape, legend = (n_batch, n_heads, d_head), "batch, heads, head width"
    states = check_states({name: (state, shape, legend) for name, state in states.items()})
    kwargs = {"segment_ids": segment_ids, **states, "return_final_state": return_final_state}
    return call(OP, implementation, (x_BTGHP, R_HGPP, b_GHP), kwargs, context_axis=context_axis)
