# SPDX-License-Identifier: Apache-2.0
"""`linear_scan` with its tokens split over devices, on top of any implementation.

What a device's tokens do to a state is affine, h -> decay h + F, channel by channel: F is the state that the op ends in
from nothing, the decay the exponential of the sum of g. The op runs again from the state that enters, which the maps of
the devices before it, composed, give (see `pallas_kernels.context`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.by_token import tokens_where
from pallas_kernels.segments import document_numbers


def linear_scan_context(scan: Callable, args: tuple, *, context_axis: str, **options):
    """`scan(*args, **options)`, an implementation of the op, on tokens of which each device of the axis has a share."""
    segment_ids = options["segment_ids"]

    def local(args):
        return scan(*args, **options | {"initial_state": None, "return_final_state": True})[1]

    state_BD = jax.checkpoint(local, policy=jax.checkpoint_policies.nothing_saveable)(args)
    own = context.StateMap(_decay(args[1], segment_ids).astype(state_BD.dtype), state_BD, context.describe(segment_ids))
    return context.scan_from_entering(scan, args, own, context_axis=context_axis, **options)


def _decay(g_BTD, segment_ids):
    """What is left of a state behind one device's tokens."""
    if segment_ids is None:
        return jnp.exp(g_BTD.sum(axis=1))
    decay_BD = jnp.exp(tokens_where(segment_ids != 0, g_BTD).sum(axis=1))
    return context.keep_rows(document_numbers(segment_ids)[:, -1] == 0, decay_BD)
