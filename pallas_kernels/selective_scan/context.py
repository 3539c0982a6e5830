# SPDX-License-Identifier: Apache-2.0
"""`selective_scan` with its tokens split over devices, on top of any implementation.

What a device's tokens do to a state is affine, h -> decay h + state, number by number of h. A device finds its own map
by running the op from nothing for the state it ends in; the decay is the exponential of A times the sum of dt. The maps
of the devices before it, composed, give the state that enters its tokens; from there the op runs again, for the
outputs. Of activations nothing is sent, of states [B, D, N] two each exchange (see `pallas_kernels.context`).
"""

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.segments import document_numbers


class _Map(typing.NamedTuple):
    """What a run of tokens does to the state before it."""

    decay_BDN: jax.Array  # 0 where a document starts behind the first real token
    state_BDN: jax.Array
    documents: context.Documents | None


def selective_scan_context(scan: Callable, args: tuple, *, context_axis: str, **options):
    """`scan(*args, **options)`, an implementation of selective_scan, on tokens of which each device has a share."""
    segment_ids, initial_state = options["segment_ids"], options["initial_state"]

    def local(args):
        from_nothing = options | {"D": None, "initial_state": None, "return_final_state": True}
        return _decay(args[1], args[2], segment_ids), scan(*args, **from_nothing)[1]

    decay_BDN, state_BDN = jax.checkpoint(local, policy=jax.checkpoint_policies.nothing_saveable)(args)
    own = _Map(decay_BDN.astype(state_BDN.dtype), state_BDN, context.describe(segment_ids))
    start_BDN = jnp.zeros_like(state_BDN) if initial_state is None else initial_state.astype(state_BDN.dtype)
    start = _Map(jnp.ones_like(own.decay_BDN), start_BDN, context.nothing(own.documents))
    entering = context.before(_joined, start, own, context_axis)
    options["initial_state"] = _keep(~context.is_cut(entering.documents, own.documents), entering.state_BDN)
    out = scan(*args, **options)
    if not options["return_final_state"]:
        return out
    return out[0], context.from_last(out[1], context_axis)


def _joined(earlier: _Map, later: _Map) -> _Map:
    decay_BDN = _keep(~context.is_cut(earlier.documents, later.documents), later.decay_BDN)
    return _Map(
        earlier.decay_BDN * decay_BDN,
        earlier.state_BDN * decay_BDN + later.state_BDN,
        context.join(earlier.documents, later.documents),
    )


def _keep(keep, array_BDN):
    """The array where keep, [B] or a scalar, else zeros."""
    return jnp.where(keep[:, None, None] if keep.ndim else keep, array_BDN, 0)


def _decay(dt_BTD, A_DN, segment_ids):
    """What is left of a state behind one device's tokens."""
    if segment_ids is not None:
        dt_BTD = jnp.where((segment_ids != 0)[:, :, None], dt_BTD, 0)
    decay_BDN = jnp.exp(dt_BTD.sum(axis=1)[:, :, None] * A_DN)
    return decay_BDN if segment_ids is None else _keep(document_numbers(segment_ids)[:, -1] == 0, decay_BDN)
