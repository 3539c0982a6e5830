# SPDX-License-Identifier: Apache-2.0
"""What the segment contract (see the package docstring) means in arrays. Axis letters: B batch, T tokens."""

import jax
import jax.numpy as jnp


def last_real_ids(segment_ids_BT: jax.Array) -> jax.Array:
    """[B, T] int32: the id of the last real token at or before each token; 0 where there was none yet."""

    def keep_latest(earlier, later):
        return jnp.where(later != 0, later, earlier)

    return jax.lax.associative_scan(keep_latest, segment_ids_BT, axis=1)


def document_numbers(segment_ids_BT: jax.Array) -> jax.Array:
    """[B, T] int32: number of the document in its row, from 0 and never falling; padding keeps the number before it.

    Two real tokens belong to one document exactly if their numbers are equal, whatever stands between them. Document
    0 is the one that an initial state continues.
    """
    latest_BT = last_real_ids(segment_ids_BT)
    before_BT = jnp.pad(latest_BT[:, :-1], ((0, 0), (1, 0)))
    starts_BT = (latest_BT != before_BT) & (before_BT != 0)
    return jnp.cumsum(starts_BT.astype(jnp.int32), axis=1)


def document_starts(segment_ids_BT: jax.Array) -> jax.Array:
    """[B, T] bool: real tokens with which a document begins, but for the first of a row, which an initial state may
    precede."""
    number_BT = document_numbers(segment_ids_BT)
    return (segment_ids_BT != 0) & (number_BT != jnp.pad(number_BT[:, :-1], ((0, 0), (1, 0))))


def document_ids(segment_ids_BT: jax.Array) -> jax.Array:
    """[B, T] int32: ids of which each belongs to one document of its row only, 0 at padding."""
    return jnp.where(segment_ids_BT != 0, document_numbers(segment_ids_BT) + 1, 0)


def real_positions(segment_ids_BT: jax.Array) -> jax.Array:
    """[B, T] int32: how many real tokens of the row stand before each token."""
    real_BT = segment_ids_BT != 0
    return jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - real_BT
