# SPDX-License-Identifier: Apache-2.0
"""`gated_delta_rule` with its tokens split over devices, on top of any implementation.

What a device's tokens do to a state is affine, S -> M S + F with a matrix M [N, N] a head. The columns of a state know
nothing of each other, so one run of the op shows both: from nothing it ends in F; from the identity, behind values of
0, in M. The maps of the devices before it, composed, give the state that enters its tokens; from there the op runs
again, for the outputs. Of activations nothing is sent, of states [B, H, N, P + N] one each exchange (see
`pallas_kernels.context`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context


def gated_delta_rule_context(scan: Callable, args: tuple, *, context_axis: str, **options):
    """`scan(*args, **options)`, an implementation of the op, on tokens of which each device of the axis has a share."""

    def run(v, start):
        q, k, _, *more = args
        return scan(q, k, v, *more, **options | {"initial_state": start, "return_final_state": True})[1]

    own = linear_map(run, args[2], args[1].shape[-1], args, options["segment_ids"])
    return context.scan_from_entering(scan, args, own, context_axis=context_axis, **options)


def linear_map(run: Callable, v_BTHP, d_key: int, args: tuple, segment_ids) -> context.LinearMap:
    """The map of one device's tokens; run(values, initial state) gives the final state."""
    n_batch, (n_heads, d_head) = v_BTHP.shape[0], v_BTHP.shape[-2:]
    dtype = jnp.result_type(*(array for array in args if array is not None), jnp.float32)
    wide_BTHP = jnp.pad(v_BTHP, [(0, 0)] * (v_BTHP.ndim - 1) + [(0, d_key)])
    behind_nothing = jnp.eye(d_key, d_head + d_key, d_head, dtype=dtype)  # [0 | 1]
    start_BHNP = jnp.broadcast_to(behind_nothing, (n_batch, n_heads, *behind_nothing.shape))
    state_BHNP = jax.checkpoint(run, policy=jax.checkpoint_policies.nothing_saveable)(wide_BTHP, start_BHNP)
    return context.LinearMap(state_BHNP[..., d_head:], state_BHNP[..., :d_head], context.describe(segment_ids))
