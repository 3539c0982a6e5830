# SPDX-License-Identifier: Apache-2.0
"""The products of routed experts on one device's tokens: sorted by expert, dropless; over a mesh axis by one exchange
of tokens on the way to the experts and one of their sums on the way back.

A token and one of its experts are an assignment; there are A = M k of them. Rows are laid out by two index arrays that
are each other's inverse, so that both directions, and their gradients, are gathers: `source` says for each row which
assignment it holds (A: none), `place` for each assignment in which row it is (the number of rows: in none).

Weights multiply what goes into the experts' last product, not what comes out, which is the same sum: so no gradient
asks for what comes out, and where layers are recomputed neither that product nor the way back is.

Axis letters: M tokens, k experts of a token, A assignments, E experts, D model, F feed-forward, X devices of the axis.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hybridlm import exchange, sharding
from hybridlm.layers.quantized import Quantized, Rounding, leaf_axes, rounded_rows
from pallas_kernels import grouped_dot
from pallas_kernels.platform import platform


def routed_per_device(
    x_BTD,
    experts_BTk,
    weights_BTk,
    w_in,
    w_out,
    activation: Callable,
    *,
    n_experts: int,
    d_ff: int,
    capacity: float | None,
) -> tuple[jax.Array, jax.Array]:
    """`routed_experts` by every device, with the experts that it has: [B, T, D] in the type of x, and bool [B, T, k]:
    which assignments it holds.

    w_in, w_out: as in `feed_forward`, of width d_ff. capacity: see `routed_within`; None: nothing is dropped. x and the
    result are split over tokens like the residual stream.
    """

    def run(x_BTD, experts_BTk, weights_BTk, *matrices, context_axis=None):
        w_in, w_out = jax.tree.unflatten(tree, matrices)
        width, is_stream = x_BTD.shape[-1], x_BTD.shape[:2] != experts_BTk.shape[:2]
        x_BTD = exchange.gather(x_BTD, ("tensor",), dim) if is_stream else x_BTD
        w_in, w_out = (_whole(w, dim, width) for w, dim in ((w_in, 1), (w_out, 2)))
        flat = [a.reshape(-1, a.shape[-1]) for a in (x_BTD, experts_BTk, weights_BTk)]
        apply, kept_Mk = feed_forward(w_in, w_out, activation), flat[1] < n_experts
        if apply.n_experts == n_experts:
            y_MD = routed_experts(*flat, apply)
        elif capacity is None:
            y_MD = routed_experts_over("expert", *flat, w_in, w_out, activation)
        else:
            y_MD, kept_Mk = routed_within("expert", *flat, apply, n_experts=n_experts, capacity=capacity)
        y_BTD = y_MD.astype(x_BTD.dtype).reshape(x_BTD.shape)
        if is_stream:
            y_BTD = exchange.scatter(y_BTD, ("tensor",), dim)
        elif w_out.shape[1] != d_ff:
            y_BTD = jax.lax.psum(y_BTD, "tensor")
        return y_BTD, kept_Mk.reshape(experts_BTk.shape)

    dim, over_stream = sharding.stream_split(*x_BTD.shape[:2])
    tokens = ("batch", "tokens", None)
    stream = (*sharding.stream_axes(*x_BTD.shape[:2]), None) if over_stream == ("tensor",) else tokens
    sides = (None,) * (w_in.ndim - 3)
    of_in, of_out = ("experts", "d_model", *sides, "d_ff"), ("experts", "d_ff", "d_model")
    names = (stream, tokens, tokens, *leaf_axes(w_in, of_in), *leaf_axes(w_out, of_out))
    matrices, tree = jax.tree.flatten((w_in, w_out))
    arrays = (x_BTD, experts_BTk, weights_BTk, *matrices)
    return sharding.per_device(run, arrays, names, [stream, tokens], split_tokens=True)


def _whole(w, dim: int, width: int):
    """Inside `per_device`: a weight put together over the axes that split d_model."""
    if w.shape[dim] == width:
        return w
    return jax.tree.map(
        lambda a: a if a.shape[dim] == 1 else exchange.gather_weight(a, sharding.RULES["d_model"], dim), w
    )


def routed_experts(x_MD, experts_Mk, weights_Mk, apply: Callable) -> jax.Array:
    """sum over k of weights[m, k] * expert(x[m]), [M, D] in the type of x.

    experts_Mk: int32; numbers that are no expert's (E and above) give zeros. apply(rows, sizes, weights): the experts'
    outputs for rows sorted by expert, sizes[e] of them expert e's (see `feed_forward`).
    """
    return _experts_of(x_MD, weights_Mk, *sort_by_expert(experts_Mk.reshape(-1), vars(apply)["n_experts"]), apply)


def _experts_of(x_MD, weights_Mk, source, place_A, sizes_E, apply: Callable) -> jax.Array:
    """`routed_experts` of assignments that have rows already."""
    top_k = weights_Mk.shape[1]
    weights_R1 = spread(weights_Mk.reshape(-1, 1), source, place_A, 1)
    y = apply(spread(x_MD, source, place_A, top_k), sizes_E, weights_R1)
    return add_up(y, source, place_A, top_k)


FIRST, MORE = 1.25, 0.25
"""Rows of the first round of `routed_experts_over`, and of each further one, as multiples of an even load's."""


def routed_experts_over(axis: str, x_MD, experts_Mk, weights_Mk, w_in, w_out, activation: Callable) -> jax.Array:
    """`routed_experts` inside a shard_map where each device of the mesh axis has E / X of the experts, in their order.
    w_in, w_out: see `feed_forward`.

    Every device gets all tokens of the axis, once, and gives back a sum for each: of k experts of a token a few devices
    have some, and room for the most tokens that can come is room for all. It makes rows of its own experts' assignments
    alone, in rounds: the first holds FIRST times the M k of an even load, and further ones, of MORE, take what is left.
    """
    n_devices, top_k, n_local = jax.lax.axis_size(axis), experts_Mk.shape[1], w_out.shape[0]
    both = (jax.lax.stop_gradient(experts_Mk).astype(jnp.float32), weights_Mk.astype(jnp.float32))  # exact numbers
    routing_M2k = exchange.gather(jnp.concatenate(both, axis=1), (axis,), 0)
    experts_Mk, weights_Mk = routing_M2k[:, :top_k], routing_M2k[:, top_k:]
    even, most = x_MD.shape[0] * top_k, n_devices * x_MD.shape[0] * min(top_k, n_local)
    x_MD = checkpoint_name(exchange.gather(x_MD, (axis,), 0), exchange.GATHERED)
    local_Mk = experts_Mk.astype(jnp.int32) - jax.lax.axis_index(axis) * n_local
    local_Mk = jnp.where((local_Mk >= 0) & (local_Mk < n_local), local_Mk, n_local)
    layout = sort_by_expert(local_Mk.reshape(-1), n_local)
    y_MD = _by_rounds(Rounds.of(even, most), activation, x_MD, weights_Mk, w_in, w_out, *layout)
    return exchange.scatter(y_MD, (axis,), 0)


class Rounds(NamedTuple):
    """How many rows are made at a time; multiples of 8."""

    first: int
    more: int
    has_more: bool
    """There can be more rows than the first round has."""

    @classmethod
    def of(cls, even: int, most: int) -> "Rounds":
        """even, most: rows of an even load, and the most that there can be."""
        first, more = (8 * math.ceil(share * even / 8) for share in (FIRST, MORE))
        return cls(min(first, 8 * math.ceil(most / 8)), more, first < most)

    def sum(self, of_round: Callable, n_rows):
        """That of the trees `of_round(first row, rows)` of all rounds that have one of n_rows rows."""
        total = of_round(0, self.first)
        if not self.has_more:
            return total
        add = lambda a, b: (a.astype(jnp.float32) + b.astype(jnp.float32)).astype(a.dtype)
        one = lambda i, total: jax.tree.map(add, total, of_round(self.first + i * self.more, self.more))
        return jax.lax.fori_loop(0, (n_rows - self.first + self.more - 1) // self.more, one, total)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_rounds(rounds: Rounds, activation: Callable, *arrays) -> jax.Array:
    """`_part` of all rows, whose arrays these are. The backward pass makes the rows of a round again."""
    of_round = lambda start, n: _part(start, n, activation, *arrays)
    return rounds.sum(of_round, jnp.sum(arrays[-1]))


def _by_rounds_backward(rounds, activation, arrays, grad_MD):
    n = 2 if any(isinstance(a, Quantized) for a in arrays) else 4  # eight-bit matrices get none

    def of_round(start, n_rows):
        part = lambda *some: _part(start, n_rows, activation, *some, *arrays[n:])
        return jax.vjp(part, *arrays[:n])[1](grad_MD)

    return *rounds.sum(of_round, jnp.sum(arrays[-1])), *[None] * (len(arrays) - n)


_by_rounds.defvjp(lambda *args: (_by_rounds(*args), args[2:]), _by_rounds_backward)


def _part(start, n: int, activation, x_MD, weights_Mk, w_in, w_out, source_A, place_A, sizes_E) -> jax.Array:
    """`routed_experts` of n rows from `start` on of those that `sort_by_expert` laid out. Assignments behind all
    experts have none."""
    row, n_rows = start + jnp.arange(n), jnp.sum(sizes_E)
    source = jnp.where(row < n_rows, jnp.take(source_A, row, mode="clip"), source_A.shape[0])
    place_A = jnp.where((place_A >= start) & (place_A < jnp.minimum(start + n, n_rows)), place_A - start, n)
    sizes_E = jnp.diff(jnp.clip(jnp.cumsum(sizes_E) - start, 0, n), prepend=0)
    return _experts_of(x_MD, weights_Mk, source, place_A, sizes_E, feed_forward(w_in, w_out, activation))


def routed_within(
    axis: str, x_MD, experts_Mk, weights_Mk, apply: Callable, *, n_experts: int, capacity: float
) -> tuple[jax.Array, jax.Array]:
    """`routed_experts_over` with no more than so many rows from one device to another.

    Every device sends each other the rows for its experts in a buffer of fixed size, computes on what it gets, and
    sends the results back. The buffer holds `capacity` times the M k / X rows of an even load, rounded up to 8, and
    what is more is left out (the later tokens first). Returns that and bool [M, k]: which assignments were computed.
    """
    (n_tokens, d_model), top_k = x_MD.shape, experts_Mk.shape[1]
    n_devices = jax.lax.axis_size(axis)
    n_local = n_experts // n_devices
    room = min(n_tokens * min(top_k, n_local), -(-int(capacity * n_tokens * top_k / n_devices + 1) // 8) * 8)
    source, place_A, sent_XE = _addresses(experts_Mk.reshape(-1), n_devices, n_local, room)
    exchange = partial(jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0)
    send = spread(x_MD, source, place_A, top_k).reshape(n_devices, room, d_model)
    received, sizes_XE = exchange(send).reshape(-1, d_model), exchange(sent_XE)
    expert = jnp.sum(
        jnp.arange(room)[None, :, None] >= jnp.cumsum(sizes_XE, axis=1)[:, None], axis=-1
    )  # n_local: an empty row
    order, back, sizes_E = sort_by_expert(expert.reshape(-1), n_local)
    sent = spread(weights_Mk.reshape(-1, 1), source, place_A, 1).reshape(n_devices, room, 1)
    weights_R1 = spread(exchange(sent).reshape(-1, 1), order, back, 1)
    y = add_up(apply(spread(received, order, back, 1), sizes_E, weights_R1), order, back, 1)
    y_MD = add_up(exchange(y.reshape(send.shape)).reshape(-1, d_model), source, place_A, top_k)
    return y_MD, (place_A < n_devices * room).reshape(experts_Mk.shape)


def feed_forward(w_in, w_out_EFD, activation: Callable) -> Callable:
    """The experts' (rows, sizes, weights) -> outputs, weighed. w_in: [E, D, F], or [E, D, 2, F] where the
    activation's side is gated. weights: [R, 1], float32."""

    def apply(rows_RD, sizes_E, weights_R1):
        h = checkpoint_name(_grouped(rows_RD, w_in, sizes_E), "moe_hidden")
        h_RF = activation(h[:, 0]) * h[:, 1] if h.ndim == 3 else activation(h)
        h_RF = (h_RF.astype(jnp.float32) * weights_R1.astype(jnp.float32)).astype(h_RF.dtype)
        return _grouped(h_RF, w_out_EFD, sizes_E)

    vars(apply)["n_experts"] = w_out_EFD.shape[0]
    return apply


def _grouped(rows_RD: jax.Array, w, sizes_E: jax.Array) -> jax.Array:
    """Rows times the matrix [E, D, ...] of their expert. The op takes floats: eight-bit matrices are converted for it,
    and what comes out is scaled."""
    rows_RD = rounded_rows(rows_RD, w)
    if not isinstance(w, Quantized):
        w = w.value if isinstance(w, Rounding) else w
        return grouped_dot(rows_RD, w.reshape(*w.shape[:2], -1), sizes_E).reshape(-1, *w.shape[2:])
    values = w.values.astype(rows_RD.dtype).reshape(*w.shape[:2], -1)
    y = grouped_dot(rows_RD, values, sizes_E).reshape(-1, *w.shape[2:])
    expert_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(y.shape[0]), side="right")
    scale = jnp.take(w.scale[:, 0], expert_R, axis=0, mode="clip")
    return (y.astype(jnp.float32) * scale).astype(y.dtype)


def sort_by_expert(experts_A, n_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(source, place, sizes [E]) of rows sorted by expert, tokens of one expert in order."""
    source_A = checkpoint_name(jnp.argsort(experts_A, stable=True), "moe_order")
    if platform() != "gpu":
        return source_A, jnp.argsort(source_A), _count(experts_A, n_experts)
    numbers_A = jnp.arange(source_A.shape[0], dtype=source_A.dtype)
    place_A = jnp.zeros_like(source_A).at[source_A].set(numbers_A, unique_indices=True, mode="promise_in_bounds")
    return source_A, place_A, _count(experts_A, n_experts)


def _count(experts_A, n_experts: int) -> jax.Array:
    return jnp.sum(experts_A[:, None] == jnp.arange(n_experts)[None], axis=0, dtype=jnp.int32)


def _addresses(experts_A, n_devices: int, n_local: int, room: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(source, place, rows sent by device and its experts [X, E / X]) of a buffer with `room` rows a device."""
    order_A, rank_A, sizes_E = sort_by_expert(experts_A, n_devices * n_local)
    sizes_XE = sizes_E.reshape(n_devices, n_local)
    before_XE = jnp.cumsum(sizes_XE, axis=1) - sizes_XE  # rows for the device's earlier experts
    sent_XE = jnp.clip(room - before_XE, 0, sizes_XE)
    start_X = jnp.cumsum(sizes_XE.sum(axis=1)) - sizes_XE.sum(axis=1)
    n_assignments, row = experts_A.shape[0], jnp.arange(room)
    of_row = order_A[jnp.clip(start_X[:, None] + row[None], max=n_assignments - 1)]
    source = jnp.where(row[None] < sent_XE.sum(axis=1)[:, None], of_row, n_assignments).reshape(-1)
    device_A = experts_A // n_local
    at_A = rank_A - start_X[jnp.clip(device_A, max=n_devices - 1)]
    is_sent_A = (device_A < n_devices) & (at_A < room)
    return source, jnp.where(is_sent_A, device_A * room + at_A, n_devices * room), sent_XE


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def spread(x_MD, source, place_A, top_k: int) -> jax.Array:
    """Rows that hold their assignments' tokens; zeros where there is none."""
    token = jnp.where(source < place_A.shape[0], source // top_k, x_MD.shape[0])
    return _take(x_MD, token)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def add_up(rows, source, place_A, top_k: int) -> jax.Array:
    """The transpose of `spread`: by token the sum over k of its assignments' rows, made in float32."""
    place_Mk = place_A.reshape(-1, top_k)
    parts = (_take(rows, place_Mk[:, i]).astype(jnp.float32) for i in range(top_k))
    return reduce(jnp.add, parts).astype(rows.dtype)


def _forward(of: Callable):
    return lambda a, source, place_A, top_k: (of(a, source, place_A, top_k), (source, place_A))


def _backward(transpose: Callable):
    return lambda top_k, saved, grad: (transpose(grad, *saved, top_k), None, None)


spread.defvjp(_forward(spread), _backward(add_up))
add_up.defvjp(_forward(add_up), _backward(spread))


def _take(array, index) -> jax.Array:
    """array[index], zeros where the index is too large."""
    return jnp.take(array, index, axis=0, mode="fill", fill_value=0)
