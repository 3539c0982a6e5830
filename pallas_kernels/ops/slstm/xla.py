# SPDX-License-Identifier: Apache-2.0
"""`slstm` token by token, as its recurrence asks for, in memory linear in T with a small factor.

Only the states that enter slabs of tokens are kept; the backward pass runs a slab again.
"""

import functools

import jax.numpy as jnp

from pallas_kernels import chunks
from pallas_kernels.by_token import scan_tokens
from pallas_kernels.ops.slstm.reference import next_state, start_of

SLAB = 128


def slstm_xla(x_BTGHP, R_HGPP, b_GHP, *, segment_ids=None, return_final_state=False, **states):
    """See `pallas_kernels.slstm`."""
    state = start_of(x_BTGHP, R_HGPP, b_GHP, states)
    if segment_ids is None:
        segment_ids = jnp.ones_like(x_BTGHP[:, :, 0, 0, 0], jnp.int32)

    def slab(x_BTGHP, marks, state):
        ids_BT = jnp.where(marks.real_BT, marks.document_BT + 1, 0)
        step = functools.partial(next_state, R_HGPP, b_GHP)
        y_BTHP, state = scan_tokens(step, state, x_BTGHP.astype(state[0].dtype), ids_BT, marks.entering_BT[:, 0] + 1)
        return y_BTHP.astype(x_BTGHP.dtype), state

    y_BTHP, state = chunks.scan_slabs(slab, x_BTGHP, segment_ids, state, chunk=1, longest=SLAB)
    return (y_BTHP, *state) if return_final_state else y_BTHP
