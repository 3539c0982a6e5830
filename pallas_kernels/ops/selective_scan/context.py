# SPDX-License-Identifier: Apache-2.0
"""`selective_scan` with its tokens split over devices, on top of any implementation.

What a device's tokens do to a state is affine, h -> decay h + state, number by number of h. A device finds its own map
by running the op from nothing for the state it ends in; the decay is the exponential of A times the sum of dt. The maps
of the devices before it, composed, give the state that enters its tokens; from there the op runs again, for the
outputs. Of activations nothing is sent, of states [B, D, N] two each exchange (see `pallas_kernels.context`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.segments import document_numbers


def selective_scan_context(scan: Callable, args: tuple, *, context_axis: str, **options):
    """`scan(*args, **options)`, an implementation of selective_scan, on tokens of which each device has a share."""
    segment_ids = options["segment_ids"]

    def local(args):
        from_nothing = options | {"D": None, "initial_state": None, "return_final_state": True}
        return _decay(args[1], args[2], segment_ids), scan(*args, **from_nothing)[1]

    decay_BDN, state_BDN = jax.checkpoint(local, policy=jax.checkpoint_policies.nothing_saveable)(args)
    own = context.StateMap(decay_BDN.astype(state_BDN.dtype), state_BDN, context.describe(segment_ids))
    return context.scan_from_entering(scan, args, own, context_axis=context_axis, **options)


def _decay(dt_BTD, A_DN, segment_ids):
    """What is left of a state behind one device's tokens."""
    dt_BTD = dt_BTD.astype(jnp.promote_types(dt_BTD.dtype, A_DN.dtype))
    if segment_ids is not None:
        dt_BTD = jnp.where((segment_ids != 0)[:, :, None], dt_BTD, 0)
    decay_BDN = jnp.exp(dt_BTD.sum(axis=1)[:, :, None] * A_DN[None])
    return decay_BDN if segment_ids is None else context.keep_rows(document_numbers(segment_ids)[:, -1] == 0, decay_BDN)
