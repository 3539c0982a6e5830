# SPDX-License-Identifier: Apache-2.0
"""State space duality: the recurrence of Mamba-2 (Dao and Gu 2024, arXiv:2405.21060, eq. 16 with scalar decay)."""

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_float, check_positive_int, check_segment_ids, check_shape, rank
from pallas_kernels.op import call, select
from pallas_kernels.ops.ssd import OP

STATES = (None, "recompute", "bfloat16", "float32")


def ssd(
    x_BTHP: jax.Array,
    dt_BTH: jax.Array,
    A_H: jax.Array | None,
    B_BTGN: jax.Array,
    C_BTGN: jax.Array,
    *,
    D: jax.Array | None = None,
    decay: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_final_state: bool = False,
    chunk: int | None = None,
    states: str | None = None,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """y_t = S_t C_t + D x_t with S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t, per head; head h reads group h // (H / G).

    Args:
      x_BTHP: inputs, bfloat16, float16, float32 or float64.
      dt_BTH: step sizes after softplus, >= 0, float32.
      A_H: decay rates, negative, float32; None with `decay`.
      B_BTGN, C_BTGN: input and output maps of the G groups; G divides H.
      D: skip weights [H] or [H, P], or None.
      decay: log decays [B, T, H] <= 0 in place of dt A, float32; dt weighs the inputs alone then. None: dt A.
      segment_ids: int32 [B, T], or None for one document a row; the contract stands in the package docstring.
      initial_state: float32 [B, H, P, N], continues the first document of each row; None is zeros.
      return_final_state: also return the state after the last real token.
      chunk: tokens a chunk of the chunked implementations; a hint, invisible in the result beyond rounding.
      states: what the backward starts its chunks from: "bfloat16" or "float32" states that the forward keeps, one for
        every 128 or 256 tokens, or "recompute": none are kept and the forward runs again. None: the dtype of x. xla and
        reference always recompute; "float32" of bfloat16 inputs is served by the TPU kernel alone.
      context_axis: mesh axis over which the tokens are split in order; to be called inside a shard_map over it.
        initial_state and the returned final state are those of the whole rows, the same on all devices of the axis;
        y_BTHP is this device's share.
      implementation: "auto", "reference", "xla", "tpu" or "gpu".

    Returns:
      y_BTHP in the dtype of x, or (y_BTHP, final_state_BHPN) with the state in float32 (float64 if x or dt is).

    Accumulation, decays and states are float32 at least. Gradients flow to every floating-point argument and through
    both results. Raises ValueError or TypeError for arguments that do not fit together, NotImplementedError where the
    named implementation cannot serve the call. Forward mode (jax.jvp) goes through reference alone; of xla its gradient
    can be differentiated so.
    """
    _check_arrays(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D, decay, initial_state)
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, x_BTHP.shape[:2], "batch, tokens of x_BTHP")
    if initial_state is not None:
        initial_state = initial_state.astype(jnp.promote_types(initial_state.dtype, jnp.float32))
    if chunk is not None:
        check_positive_int("chunk", chunk)
    if states not in STATES:
        raise ValueError(f"states ({states!r}) not one of {', '.join(map(repr, STATES))}")
    args = (x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN)
    kwargs = {
        "D": D,
        "decay": decay,
        "segment_ids": segment_ids,
        "initial_state": initial_state,
        "return_final_state": return_final_state,
        "chunk": chunk,
        "states": states,
    }
    if context_axis is None:
        return call(OP, implementation, args, kwargs)
    options = {"by_walk": select(OP, implementation, args, kwargs) is OP.implementations["gpu"]}
    return call(OP, implementation, args, kwargs, context_axis=context_axis, context_options=options)


def _check_arrays(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D, decay, initial_state) -> None:
    """Raises ValueError or TypeError unless they fit together."""
    check_shape("x_BTHP", x_BTHP, (None,) * 4, "batch, tokens, heads, head width")
    n_batch, n_tokens, n_heads, d_head = x_BTHP.shape
    if n_tokens < 1:
        raise ValueError(f"x_BTHP has {n_tokens} tokens, at least 1 is needed")
    check_shape("dt_BTH", dt_BTH, (n_batch, n_tokens, n_heads), "batch, tokens, heads of x_BTHP")
    if (A_H is None) == (decay is None):
        raise ValueError(f"A_H and decay are {'both None' if decay is None else 'both given'}: give one of them")
    if decay is None:
        check_shape("A_H", A_H, (n_heads,), "heads of x_BTHP")
        check_float("A_H", A_H, minimum_bits=32)
    else:
        check_shape("decay", decay, dt_BTH.shape, "shape of dt_BTH")
        check_float("decay", decay, minimum_bits=32)
    check_shape("B_BTGN", B_BTGN, (n_batch, n_tokens, None, None), "batch, tokens of x_BTHP, groups, state size")
    check_shape("C_BTGN", C_BTGN, B_BTGN.shape, "shape of B_BTGN")
    n_groups, d_state = B_BTGN.shape[2:]
    if n_groups < 1 or n_heads % n_groups:
        raise ValueError(f"heads of x_BTHP ({n_heads}) not divisible by groups of B_BTGN ({n_groups})")
    for name, array in (("x_BTHP", x_BTHP), ("B_BTGN", B_BTGN), ("C_BTGN", C_BTGN)):
        check_float(name, array)
    check_float("dt_BTH", dt_BTH, minimum_bits=32)
    if D is not None:
        if rank("D", D) != 1:
            check_shape("D", D, (n_heads, d_head), "heads, head width of x_BTHP; or [heads]")
        check_shape("D", D, (n_heads, d_head)[: D.ndim], "heads of x_BTHP; or [heads, head width]")
        check_float("D", D)
    if initial_state is not None:
        check_shape(
            "initial_state", initial_state, (n_batch, n_heads, d_head, d_state), "batch, heads, head width, state size"
        )
        check_float("initial_state", initial_state)
