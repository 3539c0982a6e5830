# SPDX-License-Identifier: Apache-2.0
"""The token axis split over devices: what a device must know of the tokens before its own, for use inside `shard_map`.

Each device sums its tokens up in a few numbers; `join` of two neighbours' sums is that of their tokens together and is
associative. `before` gives each device the sum of all tokens before its own, in ceil(log2(n - 1)) + 1 exchanges of one
sum; on GPUs in n - 1 at once. What the sums hold is the ops' business (`context.py` of each); documents, which all of
them need, are here.

Axis letters: B batch, T tokens of one device.
"""

import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.platform import platform
from pallas_kernels.segments import document_numbers, last_real_ids
from pallas_kernels.varying import vary_alike

SENT = "context_sent"
"""Name, for policies of `jax.checkpoint`, of what devices tell each other and what they are told: few numbers beside
tokens, and where they are kept the backward neither makes nor exchanges them again."""


class Documents(typing.NamedTuple):
    """What the ids of a run of tokens mean to its neighbours; int32 [B] each."""

    first_B: jax.Array  # id of the first real token, 0 where there is none
    last_B: jax.Array  # id of the last
    starts_B: jax.Array  # 1 where a document starts behind the first real token


def axis_size(context_axis: str) -> int:
    """Devices along the axis. ValueError unless the call is inside a shard_map over a mesh that has it."""
    try:
        return jax.lax.axis_size(context_axis)
    except (NameError, TypeError):
        raise ValueError(f"context_axis ({context_axis!r}) is no axis of a shard_map around this call") from None


def describe(segment_ids_BT: jax.Array | None) -> Documents | None:
    """Of one device's tokens; None, where all are of one document, stays None."""
    if segment_ids_BT is None:
        return None
    latest_BT = last_real_ids(segment_ids_BT)
    first_BT = jax.lax.associative_scan(lambda a, b: jnp.where(b != 0, b, a), segment_ids_BT, axis=1, reverse=True)
    starts_B = document_numbers(segment_ids_BT)[:, -1] > 0
    return Documents(first_BT[:, 0], latest_BT[:, -1], starts_B.astype(jnp.int32))


def nothing(like: Documents | None) -> Documents | None:
    """Of no tokens."""
    return None if like is None else Documents(*(jnp.zeros_like(array) for array in like))


def is_cut(earlier: Documents | None, later: Documents | None):
    """[B] bool: the first real token of `later` starts a document; False without documents."""
    if earlier is None or later is None:
        return jnp.zeros((), bool)
    return (earlier.last_B != 0) & (later.first_B != 0) & (earlier.last_B != later.first_B)


def join(earlier: Documents | None, later: Documents | None) -> Documents | None:
    """Of both runs of tokens, one behind the other."""
    if earlier is None or later is None:
        return None
    starts_B = earlier.starts_B | later.starts_B | is_cut(earlier, later).astype(jnp.int32)
    return Documents(
        jnp.where(earlier.first_B != 0, earlier.first_B, later.first_B),
        jnp.where(later.last_B != 0, later.last_B, earlier.last_B),
        starts_B,
    )


def before(joined: Callable, start, own, context_axis: str, *, reverse: bool = False):
    """The sum of `start` and of all tokens on the devices before this one; pytrees of arrays.

    joined(earlier, later) sums two up; own: of this device's tokens; start: of what stands before the first device's.
    reverse: from the last device to the first, whose "before" is behind it.
    """
    n, index = axis_size(context_axis), jax.lax.axis_index(context_axis)
    index = n - 1 - index if reverse else index
    shift = functools.partial(_shift, n=n, context_axis=context_axis, reverse=reverse)
    if by_links(context_axis):
        return _at_once(joined, start, own, shift, n, index)
    own = _select(index == 0, joined(start, own), own)
    total = shift(own, 1, 0)
    distance = 1
    while distance < n - 1:  # device i knows the `distance` devices before it, the first one with `start`
        total = _select(index > distance, joined(shift(total, distance, 1), total), total)
        distance *= 2
    return _select(index == 0, start, total)


def _at_once(joined: Callable, start, own, shift: Callable, n: int, index):
    """The same where each device tells all behind it: no exchange waits for another one."""
    total = start
    for distance, earlier in reversed([(i, shift(own, i, 0)) for i in range(1, n)]):
        total = _select(index >= distance, joined(total, earlier), total)
    return total


def sent(tree):
    """The tree, its arrays under the name SENT."""
    return jax.tree.map(lambda array: checkpoint_name(array, SENT), tree)


def in_order(run: Callable, start, own: Documents | None, context_axis: str):
    """The state that enters this device's tokens, where no map stands for them: the devices take turns.

    run(state) gives the state behind this device's tokens; start: pytree of [B, ...] before the first device's. A
    document that begins at a device's edge begins from zeros.
    """
    n, index = axis_size(context_axis), jax.lax.axis_index(context_axis)
    cut_B = is_cut(before(join, nothing(own), own, context_axis), own)
    run = jax.checkpoint(run, policy=jax.checkpoint_policies.nothing_saveable)

    def turn(state, number):
        left = _shift(run(state), 1, 0, n, context_axis)
        entering = jax.tree.map(lambda array: keep_rows(~cut_B, array), left)
        return _select(index == number + 1, entering, state), None

    start = vary_alike((start, index))[0]
    return jax.lax.scan(turn, start, jnp.arange(n - 1))[0]


LINKED = 8
"""Devices on an axis up to which GPUs pass tokens on one by one, as links of a host join each with each."""


def by_links(context_axis: str) -> bool:
    """Whether tokens go from each device to each by `swapped`: permutes, which engines of the links may copy, in the
    place of exchanges that take multiprocessors."""
    return platform() == "gpu" and axis_size(context_axis) <= LINKED


class Swap(typing.NamedTuple):
    """What devices give each other of one array."""

    piece: Callable
    """(index of another device) -> what this one gives to it."""
    put: Callable
    """(whole, what a device has given, its index) -> the array with that in its place."""
    whole: jax.Array
    """In which this device's own stands."""


def swapped(swaps: list[Swap], context_axis: str, beside=()):
    """(the arrays with what each device gives to this one put in, `beside`): pieces are on their way while `beside`, a
    tree, is computed; they are waited for behind it."""
    n, here = axis_size(context_axis), jax.lax.axis_index(context_axis)
    turned = lambda by: [(i, (i + by) % n) for i in range(n)]
    send = lambda swap, by: jax.lax.ppermute(swap.piece((here + by) % n), context_axis, turned(by))
    given = [[send(swap, by) for by in range(1, n)] for swap in swaps]
    wholes, given, beside = jax.lax.optimization_barrier(([swap.whole for swap in swaps], given, beside))
    for i, swap in enumerate(swaps):
        for by, piece in enumerate(given[i], 1):
            wholes[i] = swap.put(wholes[i], piece, (here - by) % n)
    return wholes, beside


def gathering(array: jax.Array, context_axis: str) -> Swap:
    """Of [B, T, ...] of each device [B, n, T, ...] of all."""
    n = axis_size(context_axis)
    whole = jnp.broadcast_to(array[:, None], (array.shape[0], n, *array.shape[1:]))
    return Swap(lambda _: array, functools.partial(jax.lax.dynamic_update_index_in_dim, axis=1), whole)


def scattering(array: jax.Array, context_axis: str) -> Swap:
    """Of [B, n T, ...] of each device the sum of all over this one's share of the tokens, [B, T, ...] in float32."""
    of_devices = array.reshape(array.shape[0], axis_size(context_axis), -1, *array.shape[2:])
    piece = lambda to: jax.lax.dynamic_index_in_dim(of_devices, to, 1, keepdims=False)
    own = piece(jax.lax.axis_index(context_axis)).astype(jnp.float32)
    return Swap(piece, lambda whole, given, _: whole + given, own)


def from_last(array: jax.Array, context_axis: str) -> jax.Array:
    """The last device's array, on all of them."""
    is_last = jax.lax.axis_index(context_axis) == axis_size(context_axis) - 1
    return jax.lax.psum(jnp.where(is_last, array, jnp.zeros_like(array)), context_axis)


def _shift(tree, distance: int, first: int, n: int, context_axis: str, reverse: bool = False):
    """From each device, beginning with `first`, to the one `distance` behind it; reverse: all counted from the last."""
    pairs = [(i, i + distance) for i in range(first, n - distance)]
    pairs = [(n - 1 - i, n - 1 - j) for i, j in pairs] if reverse else pairs
    return sent(jax.tree.map(lambda array: jax.lax.ppermute(array, context_axis, pairs), tree))


def _select(which, these, others):
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), these, others)


# States that a run of tokens carries on by an affine map.


class StateMap(typing.NamedTuple):
    """What a run of tokens does to the state before it: state <- decay * state + this state."""

    decay: jax.Array  # broadcasts against the state; 0 where a document starts behind the first real token
    state: jax.Array  # [B, ...]
    documents: Documents | None

    def through(self, state):
        return self.decay * state


class LinearMap(typing.NamedTuple):
    """The same where a matrix stands for the decay: state <- transition state + this state."""

    decay: jax.Array  # [B, ..., N, N]
    state: jax.Array  # [B, ..., N, P]
    documents: Documents | None

    def through(self, state):
        return jnp.matmul(self.decay, state)


def scan_from_entering(scan: Callable, args: tuple, own: StateMap | LinearMap, *, context_axis: str, **options):
    """`scan(*args, **options)` on this device's tokens, whose own map is given, from the state that enters them.

    options["initial_state"] (or None) and the final state that is returned are those of the whole rows.
    """
    initial = options["initial_state"]
    initial = jnp.zeros_like(own.state) if initial is None else initial.astype(own.state.dtype)
    options["initial_state"], _ = entering_state(own, initial, context_axis)
    out = scan(*args, **options)
    if not options["return_final_state"]:
        return out
    return out[0], from_last(out[1], context_axis)


def entering_state(own: StateMap | LinearMap, initial, context_axis: str):
    """(the state that enters this device's tokens, whether it is that of the tokens before: [B] or a scalar, False
    where a document starts at this device's edge).

    own: what this device's tokens do to a state; initial: the state before the first device's.
    """
    own = sent(own)
    start = own._replace(decay=jnp.zeros_like(own.decay), state=initial, documents=nothing(own.documents))
    entering = before(_join_maps, start, own, context_axis)
    goes_on_B = ~is_cut(entering.documents, own.documents)
    return keep_rows(goes_on_B, entering.state), goes_on_B


def leaving_gradient(decay, gradient, context_axis: str):
    """The gradient of the state behind this device's tokens, of what the devices behind it make of that state.

    gradient: of the state before each device's tokens, of what the device itself makes of it; decay: what a gradient
    of the state behind them is multiplied by on its way to the state before them. Both are 0 where a document starts
    at the device's edge.
    """
    own = StateMap(decay, gradient, None)
    start = StateMap(jnp.zeros_like(decay), jnp.zeros_like(gradient), None)
    return before(_join_maps, start, own, context_axis, reverse=True).state


def _join_maps(earlier, later):
    later = later._replace(decay=keep_rows(~is_cut(earlier.documents, later.documents), later.decay))
    return later._replace(
        decay=later.through(earlier.decay),
        state=later.through(earlier.state) + later.state,
        documents=join(earlier.documents, later.documents),
    )


def keep_rows(keep, array):
    """The array [B, ...] where keep, [B] or a scalar, else zeros."""
    return jnp.where(keep.reshape(keep.shape + (1,) * (array.ndim - 1)) if keep.ndim else keep, array, 0)
