# SPDX-License-Identifier: Apache-2.0
"""What devices exchange around products of activations with parameters, written out: gathers, scatters and sums.

The compiler could find them from shardings alone. Written out, a gradient is scattered while it is a partial sum, the
products of one input exchange it once, and a traced program says what it sends.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from hybridlm import passing, sharding
from hybridlm.sharding import split_axes
from pallas_kernels import platform

GATHERED = "sublayer_gathered"
"""Name, for remat, of what a sublayer's input becomes by tokens of other devices."""
TOKENS_APART = ("data", "fsdp", "context")
"""Mesh axes that split tokens alone, where weights are whole: each device has gradients of its own tokens."""
LONG = 16384
"""Tokens of a row, from which on weight gradients are made in order on GPUs: see `_holding`."""
SMALL = 4
"""Weights are small that are this part of the largest beside them, or less: see `_with_small`."""


def add_rows(x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
    """Their sum, of two streams. On a GPU XLA adds to the rows of a product within it, where it is asked to add rows;
    in the shape [B, T, D] it would copy the stream first."""
    if platform.platform() != "gpu":
        return x_BTD + y_BTD
    rows = lambda a: a.reshape(-1, a.shape[-1])
    add = lambda x, y: (rows(x) + rows(y)).reshape(x.shape)
    if sharding.axis_size("tensor") == sharding.axis_size("context") == 1:
        return add(x_BTD, y_BTD)
    return manual(add, (x_BTD, y_BTD), [sharding.STREAM] * 2, (sharding.STREAM, x_BTD.shape))


def manual(fn: Callable, arrays: Sequence[jax.Array], axes: Sequence[tuple], outs: tuple | list) -> Any:
    """`fn(*arrays)`, run by every device on its shards, which fn exchanges itself: by `gather`, `scatter` and `add`.

    axes: the logical axes of each array; outs: (logical axes, shape) of the result, or a list of those. Dims that do
    not divide are whole on every device, as with `constrain`. In the place of a logical axis may stand the mesh axes
    that split a dim. Without a mesh: `fn(*arrays)`.
    """
    if not sharding.is_split():
        return fn(*arrays)
    in_specs = tuple(_spec(names, array.shape) for array, names in zip(arrays, axes, strict=True))
    out_specs = tuple(_spec(*out) for out in outs) if isinstance(outs, list) else _spec(*outs)
    return sharding.shard_map(fn, in_specs, out_specs)(*arrays)


def of_parts(axes: tuple, shape: Sequence[int]) -> tuple[str, ...]:
    """What splits an array with these logical axes: mesh axes of sums [N, ...], one of what each device has of it, as
    `manual` takes them."""
    return tuple(name for of_dim in sharding.dims_axes(axes, shape) for name in of_dim)


def copied_rows(n_rows: int) -> sharding.Axis:
    """What splits the rows of an array [n_rows, ...] of which each device of `tensor` has a copy as rows of its own, so
    that it has the gradient of what it makes of them alone; not on TPUs."""
    if sharding.axis_size("tensor") == 1 or platform.platform() == "tpu":
        return "batch"
    return (*split_axes("batch", n_rows), "tensor")


def own_shape(axes: tuple, shape: Sequence[int]) -> list[int]:
    """The shape of what each device has of an array with these logical axes."""
    split = sharding.dims_axes(axes, shape)
    return [n // math.prod(map(sharding.axis_size, of_dim)) for n, of_dim in zip(shape, split, strict=True)]


def products(
    fn: Callable,
    x,
    weights: Sequence[jax.Array],
    *,
    x_axes: tuple,
    weight_axes: Sequence[tuple],
    out_axes,
    bilinear=False,
    kept: str = "",
):
    """`fn(x, *weights)`: products of activations [B, T, ...] with parameters, each device with its own heads or widths.

    out_axes: of the result (a tuple of names) or of the results (a list). What the names ask for is exchanged once for
    all products, in the type of the arrays:
    - weights are gathered over the axes that split d_model, and their gradients scattered over them; where
      `sharding.weights_are_whole`, gradients alone, as sums of which the compiler keeps a share;
    - what splits the stream alone (`sharding.stream_split`) is gathered where the results have whole `tokens`, and its
      gradient scattered;
    - sums over what `tensor` splits of x are scattered like the stream where that is the result.

    Rows of the stream devices pass on to each other. Where fn is bilinear in x and one matrix, sums of others' rows are
    on their way while those of a device's own are made. kept: name, for remat, of what the gradient reads of x then.
    """
    held = _holding(x.shape[1])
    if not sharding.is_split():
        return fn(*held(x, *weights))
    weight_axes = _as_they_come(weight_axes)
    several = isinstance(out_axes, list)
    results = jax.eval_shape(fn, x, *weights)
    names = out_axes if several else [out_axes]
    dim, over_stream = sharding.stream_split(*x.shape[:2])
    entering = over_stream if x_axes[1] == "stream" and any(out[1] == "tokens" for out in names) else ()
    summed = tuple(a for name, n in zip(x_axes[2:], x.shape[2:], strict=True) for a in split_axes(name, n))
    if x_axes[1] == "tokens" and not summed:
        names = [tuple("tokens" if name == "stream" else name for name in out) for out in names]

    put_together = _putting_together(weights, weight_axes)
    by_rows = dim == 0 and len(over_stream) == 1

    def run(x, *weights):
        x, *weights = held(x, *weights)
        if entering:
            x = passing.join_rows(x, entering[0]) if by_rows else gather(x, entering, dim)
            x = checkpoint_name(x, GATHERED)
        whole = put_together(weights)
        if entering:
            x, whole = _with_small(x, whole)
        if bilinear and by_rows and summed == over_stream:
            return passing.sums_passed_on(fn, summed[0], kept, x, *whole)
        result = fn(x, *whole)
        if not summed:
            return tuple(result) if several else result
        if set(summed) != set(over_stream):
            return add(result, summed)
        return passing.sum_rows(result, summed[0]) if by_rows else scatter(result, summed, dim)

    shapes = [result.shape for result in (results if several else [results])]
    outs = list(zip(names, shapes, strict=True))
    return manual(run, [x, *weights], [x_axes, *weight_axes], outs if several else outs[0])


def goes_round(shape: tuple[int, ...], name: str, width: int) -> bool:
    """Whether `round_products` serves a stream of this shape: what splits it alone splits the logical axis, too, and
    this is no TPU, whose own exchanges are hidden by its compiler."""
    over_stream = sharding.stream_split(*shape[:2])[1]
    return len(over_stream) == 1 and split_axes(name, width) == over_stream and platform.platform() != "tpu"


def round_products(
    first: Callable, rest: Callable, x_BTD: jax.Array, passed_BTD: jax.Array, weights: Sequence[jax.Array], weight_axes
) -> jax.Array:
    """rest(first(x, *weights), *weights), from the stream to the stream, where both take every token by itself and
    `goes_round` holds of the axis that the results are sums over: each device has its own widths of the weights. What
    first gives is an array or a pytree of some.

    Each device's tokens go round, and their sums back, while products of other tokens are made: nothing waits for
    exchanges, and nothing is put together (Wang et al. 2023, "Overlap communication with dependent computation via
    decomposition in large deep learning models"). passed: equal to x; its gradient is what others hand back, which
    nothing that is made here waits for where it is an array of its own. weight_axes: as of `products`.
    """
    weight_axes = _as_they_come(weight_axes)
    (axis,), put_together = sharding.stream_split(*x_BTD.shape[:2])[1], _putting_together(weights, weight_axes)
    held = _holding(x_BTD.shape[1])

    def run(x_BTD, passed_BTD, *weights):
        x_BTD, passed_BTD, *weights = held(x_BTD, passed_BTD, *weights)
        weights, n = put_together(weights), jax.lax.axis_size(axis)
        coming, begun = [x_BTD, *(passing.passed_on(passed_BTD, axis, by) for by in range(1, n))], []
        for by in range(n):
            begun.append(first(coming[by], *weights))
            if by + 1 < n:  # the next tokens are waited for behind this product, not before it
                begun[by], coming[by + 1] = passing.together(begun[by], checkpoint_name(coming[by + 1], GATHERED))
        back = [passing.passed_on(rest(begun[by], *weights), axis, -by) for by in range(1, n)]
        return passing.added(rest(begun[0], *weights), back)

    arrays, axes = [x_BTD, passed_BTD, *weights], [*[sharding.STREAM] * 2, *weight_axes]
    return manual(run, arrays, axes, (sharding.STREAM, x_BTD.shape))


def _holding(n_tokens: int) -> Callable:
    """Gives arrays back, of whose gradients, as a device has them before any exchange, none is used before all are
    there, on GPUs that share rows, or whose rows are long.

    There XLA's scheduler would put off the products of weight gradients, to have them beside exchanges or of its own
    accord, and what those of all sublayers read would live until then: several times what a device holds of a long
    row. Sums over devices stand behind this, so that the compiler can move them out of the loop over microbatches.
    """
    hold = sharding.axis_size("context") > 1 or n_tokens >= LONG
    return _held if hold and platform.platform() == "gpu" else lambda *arrays: arrays


def _with_small(x: jax.Array, weights: Sequence[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    """The arrays; on GPUs gradients of small weights are there before that of x is. XLA's scheduler holds all products
    for equally long: with one of those beside what exchanges the gradient of x, that would nearly be alone."""
    few = [i for i, w in enumerate(weights) if SMALL * w.size <= max(other.size for other in weights)]
    if platform.platform() != "gpu" or not few:
        return x, list(weights)
    x, *held = _held(x, *(weights[i] for i in few))
    return x, [held[few.index(i)] if i in few else w for i, w in enumerate(weights)]


@jax.custom_vjp
def _held(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return arrays


def _held_backward(_, grads):
    """Of those that there are: one of zeros would be written, and summed over devices."""
    held = iter(jax.lax.optimization_barrier([g for g in grads if not isinstance(g, SymbolicZero)]))
    return tuple(None if isinstance(g, SymbolicZero) else next(held) for g in grads)


_held.defvjp(lambda *arrays: (tuple(a.value for a in arrays), None), _held_backward, symbolic_zeros=True)


def _as_they_come(weight_axes: Sequence[tuple]) -> Sequence[tuple]:
    """Of weights that are whole over what splits d_model, or not."""
    if not sharding.weights_are_whole():
        return weight_axes
    return [tuple(None if name == "d_model" else name for name in axes) for axes in weight_axes]


def _putting_together(weights: Sequence[jax.Array], weight_axes: Sequence[tuple]) -> Callable:
    """Of a device's shards of the weights those that are whole over what splits d_model; inside `manual`."""
    sharded = [
        [(dim, split_axes(name, w.shape[dim])) for dim, name in enumerate(axes) if name == "d_model"]
        for w, axes in zip(weights, weight_axes, strict=True)
    ]
    whole = lambda w, dims: reduce(lambda w, at: gather_weight(w, at[1], at[0]), dims, w)
    return lambda shards: [whole(w, dims) for w, dims in zip(shards, sharded, strict=True)]


def gather(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
    """Inside `manual`: shards of a dim put together over mesh axes, outermost first; the gradient is scattered."""
    axes = _wide(axes)
    for groups in reversed(_stages(axes)):
        x = _gradient_rows_outermost(jax.lax.all_gather(x, axes, axis=dim, tiled=True, axis_index_groups=groups))
    return x


def scatter(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
    """Inside `manual`: sums over mesh axes of which each device keeps its shard of a dim."""
    axes = _wide(axes)
    for groups in _stages(axes):
        x = jax.lax.psum_scatter(_rows_outermost(x), axes, scatter_dimension=dim, tiled=True, axis_index_groups=groups)
    return x


def gather_weight(w: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
    """`gather` of a parameter, as a matrix whose rows are split: other shards, padded to tiles, a TPU all-reduces."""
    return _as_rows(gather, w, axes, dim)


def scatter_weight(w: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
    """`scatter` of a parameter's gradient, likewise."""
    return _as_rows(scatter, w, axes, dim)


def _as_rows(exchange: Callable, w: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
    if not _wide(axes):
        return w
    w = jnp.moveaxis(w, dim, 0)
    rows = exchange(w.reshape(w.shape[0], -1), axes, 0)
    return jnp.moveaxis(rows.reshape(-1, *w.shape[1:]), 0, dim)


def _rows_outermost(x: jax.Array) -> jax.Array:
    """x laid out in memory as its dims stand, on TPU: a scatter over the innermost becomes an all-reduce there."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if platform.platform() == "tpu" else x


@jax.custom_vjp
def _gradient_rows_outermost(x: jax.Array) -> jax.Array:
    """x, whose gradient is `_rows_outermost`."""
    return x


_gradient_rows_outermost.defvjp(lambda x: (x, None), lambda _, grad: (_rows_outermost(grad),))


def add(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Inside `manual`: sums over mesh axes."""
    axes = _wide(axes)
    return jax.lax.psum(x, axes) if axes else x


def _wide(axes: Sequence[str]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)


WHOLE_SLICE = 16
"""Devices of a slice from which on an axis over all of it is exchanged in two stages; a cube of 2 x 2 x 2 is, too."""


def _stages(axes: tuple[str, ...]) -> list[list[list[int]] | None]:
    """Groups of devices for each stage of a scatter over the axes (None: all at once); a gather has them reversed.

    Over all dimensions of a slice at once the TPU compiler makes an all-reduce of a gather as of a scatter: twice the
    bytes, and never behind other work. Over some dimensions of the torus after the others both stay what they are.
    """
    if not axes:
        return []
    n, mesh = jax.lax.axis_size(axes), jax.sharding.get_abstract_mesh()
    is_whole = n * mesh.shape.get("slice", 1) == mesh.size
    if len(axes) > 1 or not is_whole or n & (n - 1) or platform.platform() != "tpu":
        return [None]
    side = platform.torus_side(n)
    if n < WHOLE_SLICE and side**3 != n:
        return [None]
    rows, columns = range(n // side), range(side)
    across = [[row * side + column for row in rows] for column in columns]
    along = [[row * side + column for column in columns] for row in rows]
    return [across, along]


def _spec(axes: Sequence[str | tuple[str, ...] | None], shape: Sequence[int]) -> P:
    names = [None if isinstance(name, tuple) else name for name in axes]
    split = sharding.dims_axes(names, shape)
    given = (name if isinstance(name, tuple) else of_dim for name, of_dim in zip(axes, split, strict=True))
    return P(*(of_dim or None for of_dim in given))
