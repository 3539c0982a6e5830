# SPDX-License-Identifier: Apache-2.0
"""Rows [B, ...] that the devices of one mesh axis pass on to each other, inside `exchange.manual`, beside products.

What is passed on is copied by links, where there are some, and takes no multiprocessor (`train.xla`).
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def passed_on(x: jax.Array, axis: str, by: int) -> jax.Array:
    """That of the device `by` places before this one on the axis, round its end."""
    n = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + by) % n) for i in range(n)])


@jax.custom_vjp
def together(*arrays: Any) -> tuple[Any, ...]:
    """The arrays or pytrees, of which none is used before all are there; their gradients are not held together."""
    return jax.lax.optimization_barrier(arrays)


together.defvjp(lambda *arrays: (together(*arrays), None), lambda _, grads: grads)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def sums_passed_on(fn: Callable, axis: str, kept: str, x: jax.Array, *arrays: jax.Array) -> jax.Array:
    """`sum_rows(fn(x, *arrays), axis)`, each device's rows by themselves: sums of others' rows are on their way while
    those of its own are made, and so are gradients of others' while those of its own are used. kept: name, for remat,
    of those rows of x, which the gradient reads."""
    return _sums_passed_on_forward(fn, axis, kept, x, *arrays)[0]


def _sums_passed_on_forward(fn, axis, kept, x, *arrays):
    rows = [checkpoint_name(rows_of(x, axis, by), kept) for by in range(jax.lax.axis_size(axis))]
    (own, pull), *others = [jax.vjp(fn, of_one, *arrays) for of_one in rows]
    passed = [passed_on(sums, axis, by) for by, (sums, _) in enumerate(others, 1)]
    return added(own, passed), [pull, *(pull for _, pull in others)]


def _sums_passed_on_backward(fn, axis, kept, pulls, grad):
    grads = [grad, *(passed_on(grad, axis, -by) for by in range(1, len(pulls)))]
    dx, *d_arrays = zip(*(pull(of_one) for pull, of_one in zip(pulls, grads, strict=True)), strict=True)
    return in_places(dx, axis), *(reduce(jnp.add, of_array) for of_array in d_arrays)


sums_passed_on.defvjp(_sums_passed_on_forward, _sums_passed_on_backward)


def in_places(rows: Sequence[jax.Array], axis: str) -> jax.Array:
    """Rows of all devices put together, from this device's and those of the ones behind it, in turn."""
    n, each = len(rows), rows[0].shape[0]
    start = (n - jax.lax.axis_index(axis)) % n * each
    return jax.lax.dynamic_slice_in_dim(jnp.concatenate([*rows, *rows[:-1]]), start, n * each, 0)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def join_rows(x: jax.Array, axis: str) -> jax.Array:
    """`gather(x, (axis,), 0)` of rows that devices pass on, which needs no multiprocessor where links copy."""
    n, here, rows = jax.lax.axis_size(axis), jax.lax.axis_index(axis), x.shape[0]
    whole = jnp.concatenate([x] * n)  # while the others' rows come, which are then put in their places
    for by in range(1, n):
        whole, came = together(whole, passed_on(x, axis, by))
        whole = jax.lax.dynamic_update_slice_in_dim(whole, came, (here - by) % n * rows, 0)
    return whole


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_rows(x: jax.Array, axis: str) -> jax.Array:
    """`scatter(x, (axis,), 0)`, likewise."""
    others = [passed_on(rows_of(x, axis, by), axis, by) for by in range(1, jax.lax.axis_size(axis))]
    return reduce(jnp.add, others, rows_of(x, axis, 0))


join_rows.defvjp(lambda x, axis: (join_rows(x, axis), None), lambda axis, _, grad: (sum_rows(grad, axis),))
sum_rows.defvjp(lambda x, axis: (sum_rows(x, axis), None), lambda axis, _, grad: (join_rows(grad, axis),))


def rows_of(x: jax.Array, axis: str, by: int) -> jax.Array:
    """Those of the device `by` places behind this one."""
    n = jax.lax.axis_size(axis)
    rows = x.shape[0] // n
    return jax.lax.dynamic_slice_in_dim(x, (jax.lax.axis_index(axis) + by) % n * rows, rows, 0)


def added(own: jax.Array, others: Sequence[jax.Array]) -> jax.Array:
    """The sum of a product and of what others pass on meanwhile: XLA would have the product add to that while it
    writes, and so wait for it."""
    own, *others = together(own, *others)
    return reduce(jnp.add, others, own)
