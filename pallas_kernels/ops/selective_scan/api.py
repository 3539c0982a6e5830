# SPDX-License-Identifier: Apache-2.0
"""Selective scan: the recurrence of Mamba-1 (Gu and Dao 2023, arXiv:2312.00752, eq. 2 with eq. 4 for the decay)."""

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_float, check_positive_int, check_segment_ids, check_shape, rank
from pallas_kernels.op import call
from pallas_kernels.ops.selective_scan import OP


def selective_scan(
    x_BTD: jax.Array,
    dt_BTD: jax.Array,
    A_DN: jax.Array,
    B_BTN: jax.Array,
    C_BTN: jax.Array,
    *,
    D: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_final_state: bool = False,
    chunk: int | None = None,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """y_t = h_t C_t + D x_t with h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, per channel, a state of N numbers each.

    Args:
      x_BTD: inputs, bfloat16, float16, float32 or float64.
      dt_BTD: step sizes after softplus, >= 0, in any of these dtypes; float32 is the most exact.
      A_DN: decay rates, negative, float32.
      B_BTN, C_BTN: input and output maps [B, T, N], or [B, T, G, N] of G groups of channels; channel d reads group
        d // (D / G), and G divides D.
      D: skip weights [D], or None.
      segment_ids: int32 [B, T], or None for one document a row; the contract stands in the package docstring.
      initial_state: float32 [B, D, N], continues the first document of each row; None is zeros.
      return_final_state: also return the state after the last real token.
      chunk: tokens of which the backward pass holds the states at once; a hint, invisible in the result beyond
        rounding.
      context_axis: mesh axis over which the tokens are split in order; to be called inside a shard_map over it.
        initial_state and the returned final state are those of the whole rows, the same on all devices of the axis;
        y_BTD is this device's share.
      implementation: "auto", "reference", "xla", "gpu" (Hopper, N at most 16) or "tpu" (N at most 64; never in auto).

    Returns:
      y_BTD in the dtype of x, or (y_BTD, final_state_BDN) with the state in float32 (float64 if x or dt is).

    Accumulation, decays and states are float32 at least. Gradients flow to every floating-point argument and through
    both results. Raises ValueError or TypeError for arguments that do not fit together, NotImplementedError where the
    named implementation cannot serve the call. Forward mode (jax.jvp) goes through reference alone; of xla its gradient
    can be differentiated so.
    """
    _check_arrays(x_BTD, dt_BTD, A_DN, B_BTN, C_BTN, D, initial_state)
    if B_BTN.ndim == 3:
        B_BTN, C_BTN = B_BTN[:, :, None], C_BTN[:, :, None]
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, x_BTD.shape[:2], "batch, tokens of x_BTD")
    if initial_state is not None:
        initial_state = initial_state.astype(jnp.promote_types(initial_state.dtype, jnp.float32))
    if chunk is not None:
        check_positive_int("chunk", chunk)
    args = (x_BTD, dt_BTD, A_DN, B_BTN, C_BTN)
    kwargs = {
        "D": D,
        "segment_ids": segment_ids,
        "initial_state": initial_state,
        "return_final_state": return_final_state,
        "chunk": chunk,
    }
    return call(OP, implementation, args, kwargs, context_axis=context_axis)


def _check_arrays(x_BTD, dt_BTD, A_DN, B_BTN, C_BTN, D, initial_state) -> None:
    """Raises ValueError or TypeError unless they fit together."""
    check_shape("x_BTD", x_BTD, (None,) * 3, "batch, tokens, channels")
    n_batch, n_tokens, n_channels = x_BTD.shape
    if n_tokens < 1:
        raise ValueError(f"x_BTD has {n_tokens} tokens, at least 1 is needed")
    check_shape("dt_BTD", dt_BTD, x_BTD.shape, "shape of x_BTD")
    check_shape("A_DN", A_DN, (n_channels, None), "channels of x_BTD, state size")
    d_state = A_DN.shape[1]
    if rank("B_BTN", B_BTN) != 4:
        check_shape("B_BTN", B_BTN, (n_batch, n_tokens, d_state), "batch, tokens of x_BTD, state size of A_DN")
    check_shape("C_BTN", C_BTN, B_BTN.shape, "shape of B_BTN")
    groups = (None,) if B_BTN.ndim == 4 else ()
    check_shape("B_BTN", B_BTN, (n_batch, n_tokens, *groups, d_state), "batch, tokens of x_BTD, groups, state size")
    n_groups = B_BTN.shape[2] if groups else 1
    if n_groups < 1 or n_channels % n_groups:
        raise ValueError(f"channels of x_BTD ({n_channels}) not divisible by groups of B_BTN ({n_groups})")
    for name, array in (("x_BTD", x_BTD), ("dt_BTD", dt_BTD), ("B_BTN", B_BTN), ("C_BTN", C_BTN)):
        check_float(name, array)
    check_float("A_DN", A_DN, minimum_bits=32)
    if D is not None:
        check_shape("D", D, (n_channels,), "channels of x_BTD")
        check_float("D", D)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (n_batch, n_channels, d_state), "batch, channels, state size")
        check_float("initial_state", initial_state)
