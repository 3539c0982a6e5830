# SPDX-License-Identifier: Apache-2.0
"""`attention` with its tokens split over devices, on top of any implementation.

Keys and values, fewer heads than queries, are gathered from all devices; each serves queries of its own. Under a causal
mask queries late in their document see more keys, so they are dealt out: in stripes of some STRIPE tokens to devices 0,
1, ... n - 1, n - 1, ... 1, 0, and so on. Wherever documents begin, all devices then have nearly as many pairs. Outside,
tokens stay in their order. On GPUs devices pass them on one by one, for a part of the heads at a time: exchanges of
the next part and of the last one run beside the attention of one, in the backward, too.

Axis letters beyond hybridlm's: S keys of all devices.
"""

import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.ops.attention.xla import apply_gate
from pallas_kernels.segments import document_ids
from pallas_kernels.varying import vary_alike

PARTS = 2
"""Of the heads, where devices pass tokens on."""
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
    if not spread:
        k_BSKP, v_BSKP = gather(k_BTKP), gather(v_BTKP)
        return attend(q_BTHP, k_BSKP, v_BSKP, **{**options, "segment_ids": ids, "positions": positions})
    gate = options["gate"]
    stripes = _Stripes.of(n_queries, n, context_axis)
    q_position_BT = jnp.broadcast_to(stripes.positions(index), (n_batch, n_queries))
    ids = None if ids is None else (stripes.deal(ids[0]), ids[1])
    options |= {"segment_ids": ids, "positions": (q_position_BT, positions[1]), "gate": None}
    if context.by_links(context_axis):
        out_BTHP = _passed_on(attend, stripes, q_BTHP, k_BTKP, v_BTKP, options)
    else:
        k_BSKP, v_BSKP = gather(k_BTKP), gather(v_BTKP)
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
        if context.by_links(self.context_axis):
            return context.swapped([self.dealing(array)], self.context_axis)[0][0].reshape(array.shape)
        array = array.reshape(array.shape[0], self.turns, self.n, self.length, *array.shape[2:])
        array = jax.lax.all_to_all(self._turned(array), self.context_axis, split_axis=2, concat_axis=1, tiled=True)
        return array.reshape(array.shape[0], -1, *array.shape[4:])

    def collect(self, array):
        """The inverse of `deal`."""
        array = array.reshape(array.shape[0], self.n, self.turns, 1, self.length, *array.shape[2:])
        array = jax.lax.all_to_all(array, self.context_axis, split_axis=1, concat_axis=3, tiled=True)[:, 0]
        array = self._turned(array)
        return array.reshape(array.shape[0], -1, *array.shape[4:])

    def dealing(self, array) -> context.Swap:
        """`deal`, of which the array comes as [B, n, turns length, ...]."""
        own = self._given(array, jax.lax.axis_index(self.context_axis))
        whole = jnp.broadcast_to(own, (own.shape[0], self.n, *own.shape[2:]))
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
        return context.Swap(functools.partial(self._given, array), put, whole)

    def collecting(self, array) -> context.Swap:
        """`collect`, of which the array comes as `_paired`."""
        of_devices = array.reshape(array.shape[0], self.n, -1, *array.shape[2:])
        piece = lambda to: jax.lax.dynamic_slice_in_dim(of_devices, to, 1, 1)
        shape = jax.eval_shape(self._paired, array).shape
        own = piece(jax.lax.axis_index(self.context_axis)).reshape(*shape[:3], 1, *shape[4:])
        return context.Swap(piece, self._put, jnp.broadcast_to(own, shape))

    def _paired(self, array):
        """[B, T, ...] of this device's tokens as [B, turns / 2, there and back, n, length, ...]; of one turn there."""
        return array.reshape(array.shape[0], -1, min(self.turns, 2), self.n, self.length, *array.shape[2:])

    def _given(self, array, to):
        """Of this device's tokens those that the device `to` gets: [B, 1, turns length, ...]."""
        pairs = self._paired(array)
        take = lambda way: jax.lax.dynamic_index_in_dim(pairs[:, :, way], self._place(to, way), 2, keepdims=False)
        found = jnp.stack([take(way) for way in range(pairs.shape[2])], 2)
        return found.reshape(array.shape[0], 1, -1, *array.shape[2:])

    def _put(self, pairs, given, of):
        """`_paired` with those tokens put in that the device `of` had."""
        given = given.reshape(*pairs.shape[:3], 1, *pairs.shape[4:])
        for way in range(pairs.shape[2]):
            at = (0, 0, way, self._place(of, way), *[0] * (pairs.ndim - 4))
            pairs = jax.lax.dynamic_update_slice(pairs, given[:, :, way : way + 1], at)
        return pairs

    def _place(self, index, way: int):
        """Of a device's stripe in a turn there (0) or back."""
        return self.n - 1 - index if way else index

    def _turned(self, array):
        """[B, turns, n, ...] with the order of devices turned round in every other turn."""
        if self.turns == 1:
            return array
        pairs = array.reshape(array.shape[0], self.turns // 2, 2, *array.shape[2:])
        return jnp.stack([pairs[:, :, 0], jnp.flip(pairs[:, :, 1], axis=2)], axis=2).reshape(array.shape)


class _Call(typing.NamedTuple):
    """What is known as the call is traced."""

    attend: Callable
    stripes: _Stripes
    options: tuple
    """By name, but for arrays."""


def _passed_on(attend: Callable, stripes: _Stripes, q_BTHP, k_BTKP, v_BTKP, options: dict):
    """Attention of this device's tokens, which others serve as `stripes` says."""
    named = ("segment_ids", "positions", "sinks")
    masks = {name: options[name] for name in named[:2]}
    n_parts = PARTS if k_BTKP.shape[2] % PARTS == 0 else 1
    cut = lambda array, axis: [None] * n_parts if array is None else jnp.split(array, n_parts, axis)
    arrays = (q_BTHP, 2), (k_BTKP, 2), (v_BTKP, 2), (options["sinks"], 0)
    parts = list(zip(*(cut(*array) for array in arrays), strict=True))
    static = _Call(attend, stripes, tuple((name, value) for name, value in options.items() if name not in named))
    outs = _in_parts(static, *vary_alike((parts, masks)))
    return outs[0] if n_parts == 1 else jnp.concatenate(outs, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_parts(static: _Call, parts: list[tuple], masks: dict) -> list[jax.Array]:
    """Of each part of the heads (q, k, v, sinks) the results, all of this device's tokens."""
    return _in_parts_forward(static, parts, masks)[0]


def _in_parts_forward(static: _Call, parts, masks):
    stripes, axis, pulls = static.stripes, static.stripes.context_axis, []
    attend = lambda q, k, v, sinks: static.attend(q, k, v, sinks=sinks, **masks, **dict(static.options))

    def enter(i, beside):
        q, k, v, _ = parts[i]
        swaps = [stripes.dealing(q), *(context.gathering(array, axis) for array in (k, v))]
        arrays, beside = context.swapped(swaps, axis, beside)
        return [array.reshape(array.shape[0], -1, *array.shape[3:]) for array in arrays], beside

    def run(i, arrays):
        out, pull = jax.vjp(attend, *arrays, parts[i][3])
        pulls.append(pull)
        return out

    def leave(out, beside):
        (whole,), beside = context.swapped([stripes.collecting(out)], axis, beside)
        return whole.reshape(out.shape), beside

    return _one_after_the_other(len(parts), enter, run, leave), pulls


def _in_parts_backward(static: _Call, pulls, grads):
    stripes, axis = static.stripes, static.stripes.context_axis

    def enter(i, beside):
        (whole,), beside = context.swapped([stripes.dealing(grads[i])], axis, beside)
        return whole.reshape(grads[i].shape), beside

    def leave(found, beside):
        dq, dk, dv, d_sinks = found
        swaps = [stripes.collecting(dq), *(context.scattering(array, axis) for array in (dk, dv))]
        (whole, *own), beside = context.swapped(swaps, axis, beside)
        own = (total.astype(array.dtype) for total, array in zip(own, (dk, dv), strict=True))
        return (whole.reshape(dq.shape), *own, d_sinks), beside

    return _one_after_the_other(len(pulls), enter, lambda i, grad: pulls[i](grad), leave), None


_in_parts.defvjp(_in_parts_forward, _in_parts_backward)


def _one_after_the_other(n: int, enter: Callable, run: Callable, leave: Callable) -> list:
    """[leave(run(i, enter(i)))], of which the next enters and the last leaves beside each run.

    enter(i, beside) and leave(result, beside) give what they make and `beside`, for which that waits.
    """
    ends: list = []
    entered, _ = enter(0, ())
    last = None
    for i in range(n):
        result = run(i, entered)
        if i + 1 < n:
            entered, result = enter(i + 1, result)
        if i:
            end, result = leave(last, result)
            ends.append(end)
        last = result
    return [*ends, leave(last, ())[0]]
