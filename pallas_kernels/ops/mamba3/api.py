# SPDX-License-Identifier: Apache-2.0
"""The scan of Mamba-3 (2025, openreview.net/forum?id=HwCvaJOiCj; state-spaces/mamba): trapezoidal rule, rotated state,
one or several inputs and outputs a head.

y_t = S_t q'_t + D v_t with S_t = a_t (S_{t-1} + (1 - l_t) dt_t v_{t-1} k'_{t-1}^T) + l_t dt_t v_t k'_t^T, per head,
where a_t = exp(adt_t) and l_t = sigmoid(trap_t): l = 1 is Mamba-2's rule, l = 1/2 the trapezoid's. q' and k' are q +
q_bias and k + k_bias, turned by theta_t = theta_{t-1} + dt_t pi tanh(angles_t), pair by pair of channels. A document's
first token has no previous one. Then y_t is normed, if there is a norm_weight, and gated by silu(z_t).

With mimo_v (multiple input, multiple output) a token has R queries, keys and values mimo_v_r o v_t; all write to and
read from one state, and y_t = sum_r mimo_o_r o y_tr, where each y_tr is normed and gated by silu(mimo_z_r o z_t).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.checks import (
    check_float,
    check_heads,
    check_positive_int,
    check_segment_ids,
    check_shape,
    check_states,
)
from pallas_kernels.op import call
from pallas_kernels.ops.mamba3 import OP
from pallas_kernels.ops.mamba3.parts import PAIRS


def mamba3(
    q_BTGN: jax.Array,
    k_BTGN: jax.Array,
    v_BTHP: jax.Array,
    adt_BTH: jax.Array,
    dt_BTH: jax.Array,
    trap_BTH: jax.Array,
    angles_BTHS: jax.Array,
    *,
    q_bias: jax.Array | None = None,
    k_bias: jax.Array | None = None,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    norm_weight: jax.Array | None = None,
    norm_eps: float = 1e-5,
    mimo_v: jax.Array | None = None,
    mimo_z: jax.Array | None = None,
    mimo_o: jax.Array | None = None,
    rotary_pairs: str = "adjacent",
    segment_ids: jax.Array | None = None,
    return_final_state: bool = False,
    chunk: int | None = None,
    context_axis: str | None = None,
    implementation: str = "auto",
    **initial: jax.Array | None,
) -> jax.Array | tuple[jax.Array, ...]:
    """The recurrence of the module's docstring; head h reads the queries and keys of group h // (H / G).

    Args:
      q_BTGN, k_BTGN: queries and keys (C and B of Mamba-2), normed by the caller; [B, T, R, G, N] with mimo_v.
        bfloat16, float16, float32 or float64, as v_BTHP (x of Mamba-2), z and all weights. G divides H.
      adt_BTH, dt_BTH: log decays A dt <= 0 and step sizes after softplus, float32. For A itself see `decay_rates`.
      trap_BTH, angles_BTHS: before sigmoid and tanh. The channels behind the S <= N / 2 pairs are not turned.
      q_bias, k_bias: [H, N], [H, R, N] with mimo_v, or None. D: [H], or None. z: [B, T, H, P], or None.
      norm_weight: [H, P], or None: y / sqrt(mean over P of y^2 + norm_eps) * norm_weight, by head and rank.
      mimo_v, mimo_z, mimo_o: [H, R, P]; mimo_v and mimo_o together, with mimo_z where there is z.
      rotary_pairs: "adjacent" turns channels 2 i and 2 i + 1 by angle i, as published for one input; "half" channels i
        and i + N / 2, as the published kernel for several.
      segment_ids, return_final_state, chunk, context_axis, implementation: as of `pallas_kernels.ssd`; chunk is a hint.
      initial_angle, initial_ssm, initial_k, initial_v: float32 [B, H, S], [B, H, P, N], [B, H, N], [B, H, P], with
        mimo_v the latter two [B, H, R, N], [B, H, R, P]; all or none. They continue the first document of each row:
        sum of angles, state, and the last token's key (with bias, turned) and value (times mimo_v).

    Returns:
      y_BTHP in the dtype of v, or (y_BTHP, angle in [0, 2 pi), ssm, k, v), states in float32 (float64 if an input is).

    Gradients flow to every floating-point argument and through all results. Raises ValueError or TypeError for
    arguments that do not fit together, NotImplementedError where the named implementation cannot serve the call.
    """
    _check_tokens(q_BTGN, k_BTGN, v_BTHP, adt_BTH, dt_BTH, trap_BTH, angles_BTHS, z, mimo_v is not None)
    rank = None if mimo_v is None else q_BTGN.shape[2]
    weights = {"q_bias": q_bias, "k_bias": k_bias, "D": D, "norm_weight": norm_weight}
    weights |= {"mimo_v": mimo_v, "mimo_z": mimo_z, "mimo_o": mimo_o}
    _check_weights(weights, z, v_BTHP.shape[2:], k_BTGN.shape[-1], rank)
    states = _checked_states(initial, v_BTHP.shape, k_BTGN.shape[-1], angles_BTHS.shape[-1], rank)
    if rotary_pairs not in PAIRS:
        raise ValueError(f"rotary_pairs ({rotary_pairs!r}) not one of {', '.join(map(repr, PAIRS))}")
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, v_BTHP.shape[:2], "batch, tokens of v_BTHP")
    if chunk is not None:
        check_positive_int("chunk", chunk)
    ranked = lambda array, axis: array if rank or array is None else jnp.expand_dims(array, axis)
    args = (ranked(q_BTGN, 2), ranked(k_BTGN, 2), v_BTHP, adt_BTH, dt_BTH, trap_BTH, angles_BTHS)
    weights |= {name: ranked(weights[name], 1) for name in ("q_bias", "k_bias")}
    states |= {name: ranked(states[name], 2) for name in ("initial_k", "initial_v")}
    kwargs = {**weights, **states, "z": z, "norm_eps": norm_eps, "rotary_pairs": rotary_pairs, "chunk": chunk}
    kwargs |= {"segment_ids": segment_ids, "return_final_state": return_final_state}
    out = call(OP, implementation, args, kwargs, context_axis=context_axis)
    if not return_final_state or rank:
        return out
    return *out[:3], out[3][:, :, 0], out[4][:, :, 0]


def decay_rates(raw: jax.Array, activation: str = "heavy_tail", floor: float = 1e-4) -> jax.Array:
    """A <= -floor of Mamba-3 from its projection, elementwise.

    activation: "heavy_tail" (1 + x for x >= 0, 1 / (1 - x) below), of the published code since June 2026, or
    "softplus", of release 2.3.2. Raises ValueError for another.
    """
    if activation == "heavy_tail":
        size = jnp.where(raw >= 0, 1 + raw, 1 / (1 - jnp.minimum(raw, 0)))
    elif activation == "softplus":
        size = jax.nn.softplus(raw)
    else:
        raise ValueError(f"activation ({activation!r}) not one of 'heavy_tail', 'softplus'")
    return jnp.minimum(-size, -floor)


def _check_tokens(q, k, v, adt, dt, trap, angles, z, has_ranks: bool) -> None:
    """Raises ValueError or TypeError unless they fit together."""
    check_shape("v_BTHP", v, (None,) * 4, "batch, tokens, heads, head width")
    if has_ranks:
        shape = (*v.shape[:2], None, None, None)
        check_shape("q_BTGN", q, shape, "batch, tokens of v_BTHP, ranks, as mimo_v is given, groups, key width")
        check_shape("k_BTGN", k, q.shape, "shape of q_BTGN")
        check_heads(q[:, :, 0], k[:, :, 0], v, ("q_BTGN of a rank", "k_BTGN of a rank", "v_BTHP"))
    else:
        check_heads(q, k, v)
    for name, array, bits in (("adt_BTH", adt, 32), ("dt_BTH", dt, 32), ("trap_BTH", trap, 16)):
        check_shape(name, array, v.shape[:3], "batch, tokens, heads of v_BTHP")
        check_float(name, array, minimum_bits=bits)
    check_shape("angles_BTHS", angles, (*v.shape[:3], None), "batch, tokens, heads of v_BTHP, pairs of channels")
    check_float("angles_BTHS", angles)
    if angles.shape[-1] > k.shape[-1] // 2:
        raise ValueError(f"angles_BTHS has {angles.shape[-1]} angles, k has {k.shape[-1] // 2} pairs of channels")
    if z is not None:
        check_shape("z", z, v.shape, "shape of v_BTHP")
        check_float("z", z)


def _check_weights(weights: dict, z, heads: tuple, d_key: int, rank: int | None) -> None:
    """Raises ValueError or TypeError unless they fit; heads: (H, P)."""
    ranks = () if rank is None else (rank,)
    n_heads, d_head = heads
    expected = dict.fromkeys(("q_bias", "k_bias"), (n_heads, *ranks, d_key)) | {"D": (n_heads,), "norm_weight": heads}
    for name, weight in weights.items():
        if weight is not None:
            check_shape(name, weight, expected.get(name, (n_heads, *ranks, d_head)), "heads, ranks with mimo_v, width")
            check_float(name, weight)
    if (weights["mimo_v"] is None) != (weights["mimo_o"] is None):
        raise ValueError("mimo_v and mimo_o go together: give both or none")
    needed = rank is not None and z is not None
    if needed != (weights["mimo_z"] is not None):
        raise ValueError(f"mimo_z goes with mimo_v and z: it is {'missing' if needed else 'given without them'}")


def _checked_states(initial: dict, v_shape: tuple, d_key: int, n_angles: int, rank: int | None) -> dict:
    """The states by name, in float32 at least; raises ValueError or TypeError unless they fit."""
    ranks = () if rank is None else (rank,)
    n_batch, _, n_heads, d_head = v_shape
    shapes = {
        "initial_angle": ((n_angles,), "angles"),
        "initial_ssm": ((d_head, d_key), "head width, key width"),
        "initial_k": ((*ranks, d_key), "ranks with mimo_v, key width"),
        "initial_v": ((*ranks, d_head), "ranks with mimo_v, head width"),
    }
    if unknown := initial.keys() - shapes.keys():
        raise TypeError(f"mamba3() got an unexpected argument {min(unknown)!r}, not one of {', '.join(shapes)}")
    return check_states(
        {
            name: (initial.get(name), (n_batch, n_heads, *shape), f"batch, heads, {legend}")
            for name, (shape, legend) in shapes.items()
        }
    )
