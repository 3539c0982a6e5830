# SPDX-License-Identifier: Apache-2.0
"""The neural memory of Titans (Behrouz, Zhong and Mirrokni 2024, arXiv:2501.00663, eq. 8 to 14), as titans-pytorch has
it: weights of a small network that learn while they read.
"""

import jax

from pallas_kernels.checks import check_float, check_positive_int, check_segment_ids, check_shape, check_state
from pallas_kernels.op import call
from pallas_kernels.ops.titans import OP
from pallas_kernels.ops.titans.memory import Sizes, join, split, unpack


def titans(
    q_BTHP: jax.Array,
    k_BTHP: jax.Array,
    v_BTHP: jax.Array,
    rate_BTH: jax.Array,
    eta_BTH: jax.Array | None,
    alpha_BTH: jax.Array,
    g_HP: jax.Array,
    W1_HPF: jax.Array,
    W2_HFP: jax.Array,
    *,
    store_every: int = 1,
    refresh_every: int | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_final_state: bool = False,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """y_t = f(q_t; M) with f(x; g, W1, W2) = x + (g + 1) o norm(gelu(x W1) W2), a memory M that learns, per head.

    Behind every `store_every` tokens of a document, momentum Z <- sigmoid(eta) Z - G and M <- (1 - sigmoid(alpha)) M +
    Z, where G is the gradient, summed over these tokens, of rate_t |f(k_t) - v_t|^2 / P, and eta and alpha are their
    means. The token that completes them reads what it has stored. G is taken at the weights that M had after the last
    multiple of `refresh_every` tokens; 1 and 1 is the paper's own rule.

    Args:
      q_BTHP, k_BTHP, v_BTHP: queries, keys and values, bfloat16, float16, float32 or float64.
      rate_BTH: learning rates >= 0. eta_BTH: of momentum, before the sigmoid, or None: there is none. alpha_BTH: of
        forgetting, before the sigmoid. Floating point.
      g_HP, W1_HPF, W2_HFP: the weights that each document's memory starts with, floating point.
      store_every, refresh_every: tokens, the latter a multiple of the former; None: gradients are always taken at the
        weights that the document started with. They change results.
      segment_ids: int32 [B, T], or None for one document a row; the contract stands in the package docstring.
      initial_state: float32 [B, H, S], continues the first document of each row, in the midst of a chunk too; None is
        zeros, a start. See `memory_of` for what is in it.
      return_final_state: also return the state after the last real token.
      context_axis: mesh axis over which the tokens are split in order; to be called inside a shard_map over it. Devices
        take turns, as the recurrence has no shorter way.
      implementation: "auto", "reference" or "xla".

    Returns:
      y_BTHP in the dtype of v, or (y_BTHP, final_state_BHS) with the state in float32 (float64 if an input is).

    Gradients, through the memory's own too, flow to every floating-point argument and through both results. Raises
    ValueError or TypeError for arguments that do not fit together, NotImplementedError where the named implementation
    cannot serve the call.
    """
    sizes = _check_arrays(q_BTHP, k_BTHP, v_BTHP, rate_BTH, eta_BTH, alpha_BTH, g_HP, W1_HPF, W2_HFP)
    check_positive_int("store_every", store_every)
    if refresh_every is not None:
        check_positive_int("refresh_every", refresh_every)
        if refresh_every % store_every:
            raise ValueError(f"refresh_every ({refresh_every}) not a multiple of store_every ({store_every})")
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, v_BTHP.shape[:2], "batch, tokens of v_BTHP")
    shape = (v_BTHP.shape[0], v_BTHP.shape[2], sizes.state)
    initial_state = check_state("initial_state", initial_state, shape, "batch, heads, numbers of a state")
    kwargs = {"store_every": store_every, "refresh_every": refresh_every, "segment_ids": segment_ids}
    kwargs |= {"initial_state": initial_state, "return_final_state": return_final_state}
    args = (q_BTHP, k_BTHP, v_BTHP, rate_BTH, eta_BTH, alpha_BTH, g_HP, W1_HPF, W2_HFP)
    return call(OP, implementation, args, kwargs, context_axis=context_axis)


def memory_of(state_BHS: jax.Array, g_HP: jax.Array, W1_HPF: jax.Array, W2_HFP: jax.Array) -> tuple[tuple, tuple]:
    """((g, W1, W2) as they read now, (g, W1, W2) of the momentum), [B, H, ...] each, of a state."""
    sizes = Sizes(*W1_HPF.shape[1:])
    parts = unpack(state_BHS, sizes)
    return split(join(g_HP, W1_HPF, W2_HFP)[None] + parts.weights, sizes), split(parts.momentum, sizes)


def _check_arrays(q, k, v, rate, eta, alpha, g, W1, W2) -> Sizes:
    """Raises ValueError or TypeError unless they fit together."""
    check_shape("v_BTHP", v, (None,) * 4, "batch, tokens, heads, head width")
    if v.shape[1] < 1:
        raise ValueError(f"v_BTHP has {v.shape[1]} tokens, at least 1 is needed")
    for name, array in (("q_BTHP", q), ("k_BTHP", k)):
        check_shape(name, array, v.shape, "shape of v_BTHP")
    by_head = {"rate_BTH": rate, "alpha_BTH": alpha} | ({} if eta is None else {"eta_BTH": eta})
    for name, array in by_head.items():
        check_shape(name, array, v.shape[:3], "batch, tokens, heads of v_BTHP")
    n_heads, width = v.shape[2:]
    check_shape("g_HP", g, (n_heads, width), "heads, head width of v_BTHP")
    check_shape("W1_HPF", W1, (n_heads, width, None), "heads, head width of v_BTHP, hidden width")
    check_shape("W2_HFP", W2, (n_heads, W1.shape[2], width), "heads of v_BTHP, hidden width of W1_HPF, head width")
    arrays = {"q_BTHP": q, "k_BTHP": k, "v_BTHP": v, **by_head, "g_HP": g, "W1_HPF": W1, "W2_HFP": W2}
    for name, array in arrays.items():
        check_float(name, array)
    return Sizes(*W1.shape[1:])
