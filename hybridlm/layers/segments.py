# SPDX-License-Identifier: Apache-2.0
"""Documents of packed rows: their numbers, positions within them, padding moved to the end. B batch, T tokens."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from hybridlm import exchange
from hybridlm.sharding import STREAM, dims_axes, per_device
from pallas_kernels.platform import platform
from pallas_kernels.segments import document_numbers


def positions_within(segment_ids_BT: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """int32 [B, T]: how many real tokens of its document precede each token; without segments, the token's index."""
    if segment_ids_BT is None:
        return jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    real_BT = segment_ids_BT != 0
    document_BT = document_numbers(segment_ids_BT)
    before_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - real_BT
    starts_BT = jnp.pad(document_BT[:, 1:] != document_BT[:, :-1], ((0, 0), (1, 0)))
    start_BT = jax.lax.cummax(jnp.where(starts_BT, before_BT, 0), axis=1)
    return before_BT - start_BT


def room_in_front(tokens_BT: jax.Array, positions_BT: jax.Array | None, n: int) -> tuple:
    """(tokens, positions, positions within documents) with n more cells in front of each row."""
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (n, 0)))
    within_BT = positions_within(None, tokens_BT.shape)
    if positions_BT is not None:
        positions_BT = jnp.concatenate([within_BT[:, :n], positions_BT + n], axis=1)
    return tokens_BT, positions_BT, within_BT


def padding_last(segment_ids_BT: jax.Array, *arrays_BT: jax.Array | None) -> tuple[list, Callable]:
    """Rows with their padding moved behind all real tokens: ([segment_ids_BT, *arrays_BT], restore).

    `restore` moves results [B, T, D] back into place. Batches that need no move, as nearly all, are left alone, which
    is decided at run time. Behind this, sequence ops never meet padding inside a document: the distance of two of its
    tokens in the row is that in the document.
    """
    real_BT = segment_ids_BT != 0
    scattered = jnp.any(~real_BT[:, :-1] & real_BT[:, 1:])

    def sort() -> tuple[jax.Array, jax.Array]:
        return jnp.argsort(~real_BT, axis=1, stable=True).astype(jnp.int32), _place_behind(real_BT)

    def leave() -> tuple[jax.Array, jax.Array]:
        index_BT = jnp.broadcast_to(jnp.arange(real_BT.shape[1], dtype=jnp.int32), real_BT.shape)
        return index_BT, index_BT

    order_BT, place_BT = jax.lax.cond(scattered, sort, leave)
    moved = [None if a is None else _take(a, order_BT) for a in (segment_ids_BT, *arrays_BT)]

    def restore(x_BTD: jax.Array) -> jax.Array:
        return jax.lax.cond(scattered, lambda x: _take_vectors(x, place_BT[:, :, None]), lambda x: x, x_BTD)

    return moved, restore


def with_padding_last(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays [B, T] of a batch, the padding of each row (`segment_ids` 0) behind its real tokens, in their order.

    For sums over tokens, which need nothing back in place. Rows are moved whether they are in order or not: a program
    that decides it asks all devices, which would wait for each other there, in each microbatch.
    """
    names, rows = list(batch), ("batch", None)

    def of_device(segment_ids_BT: jax.Array, *arrays_BT: jax.Array) -> tuple[jax.Array, ...]:
        real_BT = segment_ids_BT != 0
        if platform() == "cpu":  # where XLA cannot keep a program on disk that has sorted anything
            put = partial(jnp.put_along_axis, indices=_place_behind(real_BT), axis=1, inplace=False)
            return tuple(put(jnp.zeros_like(a), values=a) for a in arrays_BT)
        padded_BT = (~real_BT).astype(jnp.int32)
        return tuple(jax.lax.sort((padded_BT, *arrays_BT), dimension=1, is_stable=True, num_keys=1)[1:])

    arrays = [batch["segment_ids"], *batch.values()]
    moved = per_device(of_device, arrays, [rows] * len(arrays), [rows] * len(names))
    return dict(zip(names, moved, strict=True))


def _place_behind(real_BT: jax.Array) -> jax.Array:
    """int32 [B, T]: where each token of a row stands when its padding is behind its real tokens, in their order."""
    count = partial(jnp.cumsum, axis=1, dtype=jnp.int32)
    return jnp.where(real_BT, count(real_BT), real_BT.sum(1, keepdims=True, dtype=jnp.int32) + count(~real_BT)) - 1


def _take(x: jax.Array, place: jax.Array) -> jax.Array:
    """Tokens of each row of x [B, T, ...] by their places in it; rows are each device's own: XLA's partitioner fails on
    this inside of `sharding.per_slice`."""
    rows = ("batch", None, None)[: x.ndim]
    return per_device(partial(jnp.take_along_axis, axis=1), [x, place], [rows, rows], rows)


def _take_vectors(x_BTD: jax.Array, place_BT1: jax.Array) -> jax.Array:
    """The same of the residual stream: each device takes its own tokens from the whole rows."""
    axes = dims_axes(STREAM, x_BTD.shape)[1]
    run = lambda x_BTD, place_BT1: jnp.take_along_axis(_gather_tokens(x_BTD, axes), place_BT1, axis=1)
    return exchange.manual(run, [x_BTD, place_BT1], [STREAM, STREAM], (STREAM, x_BTD.shape))


def _gather_tokens(x_BTD: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Whole rows. A GPU's compiler lays out what is gathered by tokens with these outermost, and all that it comes
    from, the whole stream, likewise: of one row no more than of several, which would be moved in each sublayer."""
    if platform() == "tpu" or not axes:
        return exchange.gather(x_BTD, axes, 1)
    whole = exchange.gather(x_BTD[None], axes, 0)
    return jnp.moveaxis(whole, 0, 1).reshape(x_BTD.shape[0], -1, x_BTD.shape[2])
