# SPDX-License-Identifier: Apache-2.0
"""`ssd` with its tokens split over devices, on top of any implementation.

What a device's tokens do to a state is affine: S -> decay S + state, with one decay a head. The device needs no scan to
know its own map: the final state from zero is one matrix product of dt x, weighed by the decay to the last token, with
B. The maps of the devices before it, composed, give the state that enters its tokens; from there the op runs as always.
Of activations nothing is sent, of states [B, H, P, N] one each exchange (see `pallas_kernels.context`).

The weights exp(sum of log decays after the token) are sums of one sign from the end, not differences of sums: as exact
in gradients as in values.

Axis letters beyond hybridlm's: R heads of a group.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.segments import document_numbers


def ssd_context(scan: Callable, args: tuple, *, context_axis: str, **options):
    """`scan(*args, **options)`, an implementation of ssd, on tokens of which each device of the axis has a share."""
    decay_BH, state_BHPN = _local(*args[:4], options["decay"], options["segment_ids"])
    own = context.StateMap(decay_BH[:, :, None, None], state_BHPN, context.describe(options["segment_ids"]))
    return context.scan_from_entering(scan, args, own, context_axis=context_axis, **options)


@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
def _local(x_BTHP, dt_BTH, A_H, B_BTGN, decay, segment_ids):
    """(decay_BH, state_BHPN) of one device's tokens."""
    n_batch, n_tokens, n_heads, d_head = x_BTHP.shape
    n_groups = B_BTGN.shape[2]
    dtype = jnp.result_type(x_BTHP, dt_BTH, jnp.float32)
    product_dtype = jnp.result_type(x_BTHP, B_BTGN)
    starts_B = None
    dt_BTH = dt_BTH.astype(dtype)
    if segment_ids is not None:
        document_BT = document_numbers(segment_ids)
        real_BT = segment_ids != 0
        last_BT = real_BT & (document_BT == document_BT[:, -1:])
        starts_B = document_BT[:, -1] > 0
        dt_BTH = jnp.where(real_BT[:, :, None], dt_BTH, 0)
        decay = None if decay is None else jnp.where(real_BT[:, :, None], decay, 0)
        x_BTHP, B_BTGN = (jnp.where(last_BT[:, :, None, None], array, 0) for array in (x_BTHP, B_BTGN))
    log_BTH = dt_BTH * A_H.astype(dtype)[None, None] if decay is None else decay.astype(dtype)
    until_BTH = jax.lax.cumsum(log_BTH, axis=1, reverse=True)
    after_BTH = jnp.pad(until_BTH[:, 1:], ((0, 0), (0, 1), (0, 0)))
    weighed_BTHP = (x_BTHP * (jnp.exp(after_BTH) * dt_BTH)[..., None]).astype(product_dtype)
    state_BGRPN = jnp.einsum(
        "btgrp,btgn->bgrpn",
        weighed_BTHP.reshape(n_batch, n_tokens, n_groups, n_heads // n_groups, d_head),
        B_BTGN.astype(product_dtype),
        preferred_element_type=dtype,
    )
    decay_BH = jnp.exp(until_BTH[:, 0])
    if starts_B is not None:
        decay_BH = context.keep_rows(~starts_B, decay_BH)
    return decay_BH, state_BGRPN.reshape(n_batch, n_heads, d_head, -1)
