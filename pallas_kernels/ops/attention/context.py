# SPDX-License-Identifier: Apache-2.0
"""`attention` with its tokens split over devices, on top of any implementation.

Keys and values, fewer heads than queries, are gathered from all devices; each serves queries of its own. Under a causal
mask queries late in their document see more keys, so they are dealt out: in stripes of some STRIPE tokens to devices 0,
1, ... n - 1, n - 1, ... 1, 0, and so on. Wherever documents begin, all devices then have nearly as many pairs. Outside,
tokens stay in their order.

Axis letters beyond hybridlm's: S keys of all devices.
"""

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.ops.attention.xla import apply_gate
from pallas_kernels.segments import document_ids

STRIPE = 512
"""Tokens of a stripe, or up to twice as many; shards of fewer than one for each device have shorter ones."""


def attention_context(attend: Callable, args: tuple, *, context_axis: str, one_side: bool, **options) -> jax.Array:
    """`attend(*args, **options)`, attention by any implementation, on tokens split over the axis.

    one_side: segment_ids are the raw ids of both sides and not yet numbers of documents.
    """
    q_BTHP, k_BTKP, v_BTKP = args
    n, index = context.axis_size(context_axis), jax.lax.axis_index(context_axis)
    n_batch, n_queries = q_BTHP.shape[:2]

    def gather(array):
        return jax.lax.all_gather(array, context_axis, axis=1, tiled=True)

    ids, positions = options["segment_ids"], options["positions"]
    if ids is not None:
        k_ids_BS = gather(ids[1])
        if one_side:
            k_ids_BS = document_ids(k_ids_BS)
            ids = (jax.lax.dynamic_slice_in_dim(k_ids_BS, index * n_queries, n_queries, axis=1), k_ids_BS)
        else:
            ids = (ids[0], k_ids_BS)
    spread = options["causal"] and positions is None and n > 1 and n_queries % n == 0
    spread = spread and (options["window"] is None or options["window"] > n_queries)
    if positions is None:
        q_position_T = jnp.arange(n_queries, dtype=jnp.int32) + index * n_queries
        k_position_S = jnp.arange(n * n_queries, dtype=jnp.int32)
        positions = tuple(jnp.broadcast_to(p, (n_batch, p.shape[0])) for p in (q_position_T, k_position_S))
    else:
        positions = (positions[0], gather(positions[1]))
    k_BSKP, v_BSKP = gather(k_BTKP), gather(v_BTKP)
    if not spread:
        return attend(q_BTHP, k_BSKP, v_BSKP, **{**options, "segment_ids": ids, "positions": positions})
    gate = options["gate"]
    stripes = _Stripes.of(n_queries, n, context_axis)
    q_position_BT = jnp.broadcast_to(stripes.positions(index), (n_batch, n_queries))
    ids = None if ids is None else (stripes.deal(ids[0]), ids[1])
    options |= {"segment_ids": ids, "positions": (q_position_BT, positions[1]), "gate": None}
    out_BTHP = stripes.collect(attend(stripes.deal(q_BTHP), k_BSKP, v_BSKP, **options))
    return out_BTHP if gate is None else apply_gate(out_BTHP, gate)


class _Stripes(typing.NamedTuple):
    """How a device's tokens are dealt out: `turns` times a stripe of `length` to each of n devices, there and back."""

    turns: int
    n: int
    length: int
    context_axis: str

    @staticmethod
    def of(n_tokens: int, n: int, context_axis: str) -> "_Stripes":
        turns = 1
        while n_tokens % (2 * turns * n) == 0 and n_tokens // (2 * turns * n) >= STRIPE:
            turns *= 2
        return _Stripes(turns, n, n_tokens // (turns * n), context_axis)

    def positions(self, index):
        """[T] int32: where in the row the tokens stand that the device of that index gets."""
        turn_R = jnp.arange(self.turns)
        stripe_R = turn_R * self.n + jnp.where(turn_R % 2 == 0, index, self.n - 1 - index)
        stripe_DR = jnp.arange(self.n)[:, None] * (self.turns * self.n) + stripe_R[None]
        token_DRT = stripe_DR[:, :, None] * self.length + jnp.arange(self.length)[None, None]
        return token_DRT.reshape(-1).astype(jnp.int32)

    def deal(self, array):
        """[B, T, ...] of this device's tokens -> of those that it gets, in their order."""
        array = array.reshape(array.shape[0], self.turns, self.n, self.length, *array.shape[2:])
        array = jax.lax.all_to_all(self._turned(array), self.context_axis, split_axis=2, concat_axis=1, tiled=True)
        return array.reshape(array.shape[0], -1, *array.shape[4:])

    def collect(self, array):
        """The inverse of `deal`."""
        array = array.reshape(array.shape[0], self.n, self.turns, 1, self.length, *array.shape[2:])
        array = jax.lax.all_to_all(array, self.context_axis, split_axis=1, concat_axis=3, tiled=True)[:, 0]
        array = self._turned(array)
        return array.reshape(array.shape[0], -1, *array.shape[4:])

    def _turned(self, array):
        """[B, turns, n, ...] with the order of devices turned round in every other turn."""
        if self.turns == 1:
            return array
        pairs = array.reshape(array.shape[0], self.turns // 2, 2, *array.shape[2:])
        return jnp.stack([pairs[:, :, 0], jnp.flip(pairs[:, :, 1], axis=2)], axis=2).reshape(array.shape)
