# SPDX-License-Identifier: Apache-2.0
"""Causal depthwise convolution over tokens with bias and activation: the short convolution of Mamba and relatives."""

import jax

from pallas_kernels.checks import check_float, check_segment_ids, check_shape
from pallas_kernels.op import call
from pallas_kernels.ops.causal_conv1d import OP

ACTIVATIONS = (None, "silu")


def causal_conv1d(
    x_BTD: jax.Array,
    w_DW: jax.Array,
    b_D: jax.Array | None = None,
    *,
    activation: str | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_final_state: bool = False,
    gaps: bool = True,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """y_t = activation(b + sum over j of w[:, j] x_{t - (W - 1) + j}); w[:, W - 1] meets the current token.

    Args:
      x_BTD: inputs, bfloat16, float16, float32 or float64.
      w_DW: taps, W >= 1, oldest first.
      b_D: bias, or None.
      activation: None or "silu".
      segment_ids: int32 [B, T], or None for one document a row; the contract stands in the package docstring.
      initial_state: [B, W - 1, D], the raw inputs before the first token, oldest first; None is zeros.
      return_final_state: also return the last W - 1 raw inputs of each row's last document. They reach back into
        initial_state if that is the first document and shorter than W - 1 tokens, and are zero before its start
        otherwise.
      gaps: False promises that no padding stands between two tokens of one document, nor between initial_state and the
        first token. Then nothing is decided at run time, for which a GPU would have to wait; if it is not so, tokens
        next to such padding come out wrong.
      context_axis: mesh axis over which the tokens are split in order; to be called inside a shard_map over it.
        initial_state and the returned final state are those of the whole rows, the same on all devices of the axis;
        y_BTD is this device's share.

    Returns:
      y_BTD in the dtype of x, or (y_BTD, final_state [B, W - 1, D] in the dtype of x, of which it is a copy).

    Sums are float32 at least. Gradients flow to x, w, b and initial_state and through both results. Raises ValueError
    or TypeError for arguments that do not fit together, NotImplementedError where the named implementation cannot
    serve. Forward mode (jax.jvp) goes through reference alone; of xla its gradient can be
    differentiated so where segment_ids is None.
    """
    check_shape("x_BTD", x_BTD, (None,) * 3, "batch, tokens, width")
    n_batch, n_tokens, d_model = x_BTD.shape
    if n_tokens < 1:
        raise ValueError(f"x_BTD has {n_tokens} tokens, at least 1 is needed")
    check_shape("w_DW", w_DW, (d_model, None), "width of x_BTD, taps")
    n_taps = w_DW.shape[1]
    if n_taps < 1:
        raise ValueError(f"w_DW has {n_taps} taps, at least 1 is needed")
    check_float("x_BTD", x_BTD)
    check_float("w_DW", w_DW)
    if b_D is not None:
        check_shape("b_D", b_D, (d_model,), "width of x_BTD")
        check_float("b_D", b_D)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation ({activation!r}) not one of None, 'silu'")
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, (n_batch, n_tokens), "batch, tokens of x_BTD")
    if initial_state is not None:
        check_shape("initial_state", initial_state, (n_batch, n_taps - 1, d_model), "batch, taps of w_DW - 1, width")
        check_float("initial_state", initial_state)
    args = (x_BTD, w_DW, b_D)
    kwargs = {
        "activation": activation,
        "segment_ids": segment_ids,
        "initial_state": initial_state,
        "return_final_state": return_final_state,
        "gaps": gaps,
    }
    return call(OP, implementation, args, kwargs, context_axis=context_axis)
