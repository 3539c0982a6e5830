# SPDX-License-Identifier: Apache-2.0
"""`linear_attention` with its tokens split over devices, on top of any implementation.

What a device's tokens do to a state is affine, S -> decay S + F, with one decay a head or key channel. A device finds F
by running the op from nothing for the state it ends in; the decay is the exponential of the sum of g. The maps of the
devices before it, composed, give the state that enters its tokens; from there the op runs again, for the outputs. Of
activations nothing is sent, of states one each exchange (see `pallas_kernels.context`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.by_token import tokens_where
from pallas_kernels.segments import document_numbers


def linear_attention_context(scan: Callable, args: tuple, *, context_axis: str, **options):
    """`scan(*args, **options)`, an implementation of the op, on tokens of which each device of the axis has a share."""
    segment_ids = options["segment_ids"]

    def local(args):
        return scan(*args, **options | {"initial_state": None, "return_final_state": True})[1]

    state_BHNP = jax.checkpoint(local, policy=jax.checkpoint_policies.nothing_saveable)(args)
    decay_BHN1 = _decay(args[3], args[2], segment_ids).astype(state_BHNP.dtype)
    own = context.StateMap(decay_BHN1, state_BHNP, context.describe(segment_ids))
    return context.scan_from_entering(scan, args, own, context_axis=context_axis, **options)


def _decay(g, v_BTHP, segment_ids):
    """What is left of a state behind one device's tokens, [B, H, N or 1, 1]."""
    n_batch, n_tokens, n_heads = v_BTHP.shape[:3]
    g = jnp.zeros((n_heads,), jnp.float32) if g is None else g
    g = jnp.broadcast_to(g, (n_batch, n_tokens, n_heads)) if g.ndim == 1 else g
    if segment_ids is not None:
        g = tokens_where(segment_ids != 0, g)
    decay = jnp.exp(g.sum(axis=1))
    decay_BHN1 = decay.reshape(n_batch, n_heads, -1, 1)
    if segment_ids is None:
        return decay_BHN1
    return context.keep_rows(document_numbers(segment_ids)[:, -1] == 0, decay_BHN1)
