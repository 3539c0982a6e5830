# SPDX-License-Identifier: Apache-2.0
"""Parameters: what each one is (its metadata), and how a layer makes and uses it.

Every parameter is an `nnx.Param` in float32 with this metadata, one entry an axis of one layer's value (a scanned model
stacks the values of its repeats along a leading axis that is not counted):

- axes: logical axis names (None: no name), see `hybridlm.sharding.RULES`.
- kind: matrix, embedding, norm, bias, recurrence, conv or sink.
- n_in: of a matrix, how many axes are contracted: the first, fused ones aside; the others are its outputs.
- fused_axes: of a matrix, axes that count independent matrices stored together.
- apart: of one with one fused axis, that those matrices have products of their own, see `layers.quantized.dot_parts`:
  a program may have them as arrays of their own, a `Parts`.
- joined: of several matrices of one layer, that `layers.quantized.dot_all` takes them together: a program may have them
  as one array, each as a `Joined`.
- exact: of a matrix, that it is used in float32. Others reach a layer in the type of the computation already where all
  are cast at once: once a step in training, once a text in decoding.
- activations: of a matrix, that its products round their other side, see `layers.quantized`; else not there.

The value of a matrix may be a `Quantized`, whose arrays are of the kinds quantized and scale.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybridlm import exchange, sharding
from hybridlm.layers.quantized import Joined, Operand, Parts, Quantized, Rounding, Wide, dot, dot_all, leaf_axes
from pallas_kernels import platform

Kind = Literal["matrix", "embedding", "norm", "bias", "recurrence", "conv", "sink", "quantized", "scale"]


@dataclass(frozen=True)
class ParamInfo:
    """What a parameter is; a leaf in pytrees shaped like the parameters."""

    axes: tuple[str | None, ...]
    """Logical axes of one layer's value (without the stacked axis)."""
    kind: Kind
    """matrix, embedding, norm, bias, recurrence, conv or sink; of a quantised matrix, quantized and scale."""
    n_in: int
    """How many axes of a matrix are contracted: the first, the stacked one and fused ones aside."""
    fused_axes: tuple[int, ...]
    """Axes (without the stacked one) that count independent matrices."""
    stacked: bool
    """The value has a leading axis over the repeats of a scanned group."""
    shape: tuple[int, ...]
    """Shape of the value, the stacked axis included."""
    exact: bool = False
    """A matrix that is used in float32, whatever the type of the computation."""
    apart: bool = False
    """Its fused axis counts matrices whose products are taken apart."""
    joined: bool = False
    """Its product is taken with those of the others of the layer that are."""


def param_info(params):
    """Pytree shaped like the parameters, ParamInfo in place of arrays.

    params: a model, abstract or not, or the State of its `nnx.Param`s, as `nnx.state(model, nnx.Param)` gives it.
    `jax.tree.map(f, params, param_info(params))` works on any pytree of that structure.
    """
    state = nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params
    variables = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return jax.tree.unflatten(jax.tree.structure(state), [info for variable in variables for info in _info(variable)])


def _info(variable: nnx.Variable) -> list[ParamInfo]:
    """Of each array of a parameter: of one that is not quantised there is one."""
    meta, value = variable.get_metadata(), variable.get_value()
    shape = tuple(value.shape)
    stacked = len(shape) == len(meta["axes"]) + 1
    exact = meta.get("exact", False)
    more = exact, meta.get("apart", False), meta.get("joined", False)
    info = ParamInfo(meta["axes"], meta["kind"], meta["n_in"], meta["fused_axes"], stacked, shape, *more)
    return jax.tree.leaves(quantized_info(info, value.scale.shape)) if isinstance(value, Quantized) else [info]


def quantized_info(info: ParamInfo, scale_shape: tuple[int, ...]) -> Quantized:
    """ParamInfo of the arrays of a matrix, whose own is given, once it is quantised."""
    inner = scale_shape[1:] if info.stacked else scale_shape
    axes = tuple(None if n == 1 else name for name, n in zip(info.axes, inner, strict=True))
    return Quantized(replace(info, kind="quantized"), replace(info, kind="scale", axes=axes, shape=tuple(scale_shape)))


def contracted_axes(info: ParamInfo) -> list[int]:
    """The axes of a matrix's value, the stacked one counted, that its product adds over."""
    free = [axis for axis in range(len(info.axes)) if axis not in info.fused_axes]
    return [axis + info.stacked for axis in free[: info.n_in]]


def make(
    value: jax.Array, axes: tuple[str | None, ...], kind: Kind, *, n_in: int = 0, fused_axes: tuple = (), **more: bool
) -> nnx.Param:
    """A parameter with its metadata; float32."""
    if value.ndim != len(axes):
        raise ValueError(f"axes ({axes}) must name the {value.ndim} axes of shape {value.shape}")
    return nnx.Param(value.astype(jnp.float32), axes=axes, kind=kind, n_in=n_in, fused_axes=fused_axes, **more)


def matrix(
    rngs: nnx.Rngs, shape, axes, std: float, *, n_in: int = 1, fused_axes: tuple = (), exact: bool = False,
    apart: bool = False, joined: bool = False,
) -> nnx.Param:  # fmt: skip
    """A matrix drawn from a normal distribution of standard deviation `std`."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    more = {name: True for name, yes in (("exact", exact), ("apart", apart), ("joined", joined)) if yes}
    return make(value, axes, "matrix", n_in=n_in, fused_axes=fused_axes, **more)


def in_type(values, info, dtype):
    """Matrices in the type of the computation, but exact ones; the same numbers, as each use would cast them first.

    values: tree like `info`, the tree of ParamInfo.
    """

    def cast(value, leaf):
        return value.astype(dtype) if leaf.kind == "matrix" and not leaf.exact else value

    return jax.tree.map(cast, values, info)


def zeros(shape, axes, kind: Kind) -> nnx.Param:
    """A parameter that starts at zero."""
    return make(jnp.zeros(shape, jnp.float32), axes, kind)


def ones(shape, axes, kind: Kind) -> nnx.Param:
    """A parameter that starts at one."""
    return make(jnp.ones(shape, jnp.float32), axes, kind)


def by_layer(layer: tuple, value: Callable[[int, int], np.ndarray]) -> jax.Array:
    """`value(index, count)` of a layer (`Make.layer`), from a table of all layers where the index is traced: computed
    in the program, its last bit would depend on how that is compiled, and so on the mesh."""
    index, count = layer
    if isinstance(index, int):
        return jnp.asarray(value(index, count), jnp.float32)
    return jnp.asarray(np.stack([np.asarray(value(i, count), np.float32) for i in range(count)]))[index]


def uniforms(rngs: nnx.Rngs, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Small arrays drawn uniformly from [0, 1), all at once: each draw of its own is a program to compile."""
    sizes = [math.prod(shape) for shape in shapes]
    flat = jax.random.uniform(rngs.params(), (sum(sizes),), jnp.float32)
    cuts = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return [part.reshape(shape) for part, shape in zip(jnp.split(flat, cuts), shapes, strict=True)]


def use(param: nnx.Param, dtype) -> jax.Array:
    """The parameter's value in the type of the computation, gathered over the fsdp axis."""
    value = param[...]
    if isinstance(value, Quantized):
        return held(param, dtype).dequantised(dtype)
    value = value.value if isinstance(value, Wide) else value
    return sharding.gather_fsdp(value, dtype, param.get_metadata()["axes"])


def held(param: nnx.Param, dtype) -> Any:
    """`use` of a matrix as `layers.quantized.einsum` takes it: quantised ones stay so."""
    value, axes = operand(param, dtype), param.get_metadata()["axes"]
    if isinstance(value, Rounding):
        return Rounding(use(param, dtype), value.activations)
    if not isinstance(value, Quantized):
        return use(param, dtype)
    names = leaf_axes(value, axes)
    leaves, tree = jax.tree.flatten(value)
    return jax.tree.unflatten(tree, [sharding.gather_fsdp(a, a.dtype, of) for a, of in zip(leaves, names, strict=True)])


def operand(param: nnx.Param, dtype) -> Operand:
    """The parameter's value as products take it, in the type of the computation unless it is quantised."""
    value, activations = param[...], param.get_metadata().get("activations")
    if isinstance(value, Quantized):
        return replace(value, activations=activations)
    if activations is None and isinstance(value, Wide | Parts | Joined):
        return value
    value = value.astype(dtype)
    return value if activations is None else Rounding(value, activations)


def project(x_BTD: jax.Array, weight: Any, bias: nnx.Param | None = None) -> jax.Array:
    """x @ weight [D, ...] + bias, [B, T, ...], in the input's type."""
    return projections(x_BTD, (weight, bias))[0]


def projections(x_BTD: jax.Array, *pairs: tuple[Any, nnx.Param | None]) -> list[jax.Array]:
    """x @ weight [D, ...] + bias of each pair, [B, T, ...], in the input's type.

    x comes split over tokens like the residual stream, and is put together once for all products whose results are
    split by heads or widths; a product that is not stays split over tokens. Of a `Read` all are of one kind.
    """
    axes = [_results(weight) for weight, _ in pairs]
    ys: list[Any] = [None] * len(pairs)
    for tokens in dict.fromkeys(names[1] for names in axes):
        here = [i for i, names in enumerate(axes) if names[1] == tokens]
        found = enter(_products_of, x_BTD, [pairs[i][0] for i in here], [axes[i] for i in here])
        for i, y in zip(here, found, strict=True):
            ys[i] = y
    return [y if bias is None else y + use(bias, y.dtype)[None, None] for y, (_, bias) in zip(ys, pairs, strict=True)]


def _products_of(x, *weights) -> list[jax.Array]:
    """x @ weight of each; x: or what each reads. Those that are joined have one product, of what the first reads."""
    xs = x if isinstance(x, tuple) else several(x, len(weights))
    joined = [i for i, w in enumerate(weights) if isinstance(w, Joined)]
    found = dict(zip(joined, dot_all(xs[joined[0]], [weights[i] for i in joined]), strict=True)) if joined else {}
    return [found[i] if i in found else dot(x, w) for i, (x, w) in enumerate(zip(xs, weights, strict=True))]


class Read(NamedTuple):
    """What a mixer reads whose gradient comes in several arrays."""

    x_BTD: jax.Array
    more: tuple[jax.Array, ...]
    """Equal to it. Their gradients are those of the products behind the first, or what other devices hand back; nothing
    else is made of them."""

    def astype(self, dtype) -> "Read":
        """Each in a type."""
        return Read(*jax.tree.map(lambda x: x.astype(dtype), tuple(self)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each."""
        return self.x_BTD.shape

    @property
    def dtype(self) -> Any:
        """Of each."""
        return self.x_BTD.dtype


@jax.custom_vjp
def each(x: jax.Array, *more: jax.Array) -> tuple[jax.Array, ...]:
    """The first array in the place of each, which are equal; each has the gradient of its own."""
    return (x,) * (1 + len(more))


each.defvjp(lambda x, *more: (each(x, *more), None), lambda _, grads: tuple(grads))


def several(x_BTD: jax.Array, n: int) -> tuple[jax.Array, ...]:
    """x, [B, T, ...], for each of n products of it, whose gradients are added as `in_turn` has it on GPUs."""
    return _several(x_BTD, n) if n > 1 and platform.platform() == "gpu" else (x_BTD,) * n


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _several(x_BTD: jax.Array, n: int) -> tuple[jax.Array, ...]:
    return (x_BTD,) * n


_several.defvjp(lambda x, n: (_several(x, n), None), lambda n, _, grads: (in_turn(grads).reshape(grads[0].shape),))


def in_turn(grads: Sequence[jax.Array]) -> jax.Array:
    """The sum of what products [B, T, D] hand back, as rows [R, D]: each adds to those behind it while it writes, which
    XLA makes of a product that comes first in a sum of rows; the last of them, which is the first, should be the least.
    """
    rows = lambda a: a.reshape(-1, a.shape[-1])
    return reduce(lambda total, d: rows(d) + total, reversed(grads[:-1]), rows(grads[-1]))


def enter(fn: Callable, x_BTD: Any, weights: Sequence[nnx.Param], out_axes, x_axes: tuple = sharding.STREAM):
    """`fn(x, *weights)`, products of the normed residual stream, weights in its type; see `exchange.products`. Matrices
    are for `layers.quantized.dot` and its like. Of a `Read` fn gets a tuple of arrays, one for each of its gradients.
    """
    return _products(fn, x_BTD, weights, x_axes=x_axes, out_axes=out_axes)


def leave(y: jax.Array, weight: nnx.Param, bias: nnx.Param | None = None, kept: str = "") -> jax.Array:
    """y [B, T, *inputs] times weight [*inputs, D], plus bias: [B, T, D], split over tokens like the residual stream.
    kept: name of y for remat."""
    y = checkpoint_name(y, kept) if kept else y
    axes = weight.get_metadata()["axes"]
    out = _products(
        lambda y, w: dot(y, w, len(axes) - 1), y, [weight], x_axes=("batch", "tokens", *axes[:-1]),
        out_axes=sharding.STREAM, bilinear=isinstance(operand(weight, y.dtype), jax.Array | Wide), kept=kept,
    )  # fmt: skip
    return out if bias is None else out + use(bias, out.dtype)[None, None]


def round_products(first: Callable, rest: Callable, x_BTD: Any, weights: Sequence[nnx.Param]) -> jax.Array:
    """`rest(first(x, *weights), *weights)`; see `exchange.round_products`. Weights as of `enter`. x: an array, or a
    `Read` of which others get the second."""
    x_BTD, (passed_BTD,) = x_BTD if isinstance(x_BTD, Read) else (x_BTD, (x_BTD,))
    leaves, names, (first, rest) = _arrays((first, rest), weights, x_BTD.dtype)
    return exchange.round_products(first, rest, x_BTD, passed_BTD, leaves, names)


def _products(fn: Callable, x: Any, weights: Sequence[nnx.Param], *, x_axes: tuple, out_axes, **more: Any):
    """`exchange.products` with parameters, of which each may be several arrays."""
    x, others = x if isinstance(x, Read) else (x, ())
    leaves, names, (run,) = _arrays((fn,), weights, x.dtype)
    n, of_several = len(others), lambda x, *arrays: run(each(x, *arrays[:n]), *arrays[n:])
    axes: dict[str, Any] = {"x_axes": x_axes, "weight_axes": [*[x_axes] * n, *names], "out_axes": out_axes}
    return exchange.products(of_several if n else run, x, [*others, *leaves], **axes, **more)


def _arrays(fns: Sequence[Callable], weights: Sequence[nnx.Param], dtype) -> tuple[list, list, list[Callable]]:
    """The arrays of parameters as products take them, the logical axes of each, and each fn(x, *weights) as one of
    (x, *arrays)."""
    values = [operand(weight, dtype) for weight in weights]
    axes = [weight.get_metadata()["axes"] for weight in weights]
    names = [of for value, of_value in zip(values, axes, strict=True) for of in leaf_axes(value, of_value)]
    leaves, tree = jax.tree.flatten(values)
    of_arrays = lambda fn: lambda x, *leaves: fn(x, *jax.tree.unflatten(tree, leaves))
    return leaves, names, [of_arrays(fn) for fn in fns]


def _results(weight: nnx.Param) -> tuple[str | None, ...]:
    """Logical axes of x @ weight: tokens whole where something else is split over the axes that split the stream."""
    names = [None if name == "d_model" else name for name in weight.get_metadata()["axes"][1:]]
    taken = {axis for name in names for axis in sharding.RULES.get(name or "", ())}
    return ("batch", "tokens" if taken & set(sharding.RULES["stream"]) else "stream", *names)
