# SPDX-License-Identifier: Apache-2.0
"""Documents of packed rows: their numbers and the positions within them. Axis letters: B batch, T tokens."""

import jax
import jax.numpy as jnp

from pallas_kernels.segments import document_numbers


def number_documents(segment_ids_BT: jax.Array) -> jax.Array:
    """Segment ids that count documents: 1, 2, ... within a row, 0 for padding.

    An id that comes back after another document starts a new document, as it does in the recurrent ops.
    """
    return jnp.where(segment_ids_BT != 0, document_numbers(segment_ids_BT) + 1, 0)


def positions_within(segment_ids_BT: jax.Array | None, shape: tuple[int, int]) -> jax.Array:
    """int32 [B, T]: how many real tokens of its document precede each token; without segments, the token's index."""
    if segment_ids_BT is None:
        return jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    real_BT = segment_ids_BT != 0
    document_BT = document_numbers(segment_ids_BT)
    before_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - real_BT
    starts_BT = jnp.pad(document_BT[:, 1:] != document_BT[:, :-1], ((0, 0), (1, 0)))
    start_BT = jax.lax.cummax(jnp.where(starts_BT, before_BT, 0), axis=1)
    return before_BT - start_BT
