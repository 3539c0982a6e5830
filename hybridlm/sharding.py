# SPDX-License-Identifier: Apache-2.0
"""From logical axes to mesh axes: one table, and everything that reads it.

Sharding is GSPMD's (Auto axes): arrays carry shardings, `constrain` pins activations, and the sequence ops, which the
compiler cannot split by itself, run per device on their rows and heads through `per_device`. The mesh is the one of
`jax.set_mesh`; without one, or with one device, every function here that takes arrays gives them back as they are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybridlm.errors import ConfigError, require

RULES = {
    "batch": ("data", "fsdp", "expert"),
    "tokens": ("context",),
    "stream": ("context", "tensor"),  # tokens between sublayers, where every token is by itself
    "vocab": ("tensor",),
    "d_model": ("fsdp",),  # of parameters; activations keep their width whole
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "groups": ("tensor",),
    "d_ff": ("tensor",),
    "d_inner": ("tensor",),
    "experts": ("expert",),
}
"""Logical axis -> mesh axes. An axis without an entry is never split."""
REPLICABLE = frozenset({"kv_heads", "groups", "batch"})
"""Axes that are kept whole on every device where their size is not divisible by the mesh axes; others must divide."""
STREAM = ("batch", "stream", None)
"""Logical axes of the residual stream [B, T, D]."""
MESH_AXES = tuple(dict.fromkeys(axis for axes in RULES.values() for axis in axes))
"""The mesh's axes, outermost first, as RULES names them first: neighbours along the last are nearest to each other.

A new axis is a field of MeshConfig and an entry in RULES.
"""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; one of the axes may be -1: all devices that the others leave."""

    data: int = -1
    """Replicas of the parameters; rows are split over them."""
    fsdp: int = 1
    """Ways to shard parameters and optimizer state; rows are split over them too."""
    tensor: int = 1
    """Ways to shard heads, feed-forward width and vocabulary."""
    context: int = 1
    """Ways to split the tokens of a row; divides data.seq_len."""
    expert: int = 1
    """Ways to shard the experts of MoE blocks; rows are split over them too, other parameters are not."""

    def __post_init__(self):
        sizes = asdict(self)
        for name, size in sizes.items():
            require(size >= 1 or size == -1, f"mesh.{name} ({size}) must be at least 1, or -1 for all that is left")
        require(list(sizes.values()).count(-1) <= 1, f"mesh ({sizes}): only one axis can be -1")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with the axes of MESH_AXES over `devices` (all by default).

    An axis of size -1 takes what the others leave. ConfigError where the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {name: getattr(config, name) for name in MESH_AXES}
    text = f"mesh ({' x '.join(f'{name} {size}' for name, size in sizes.items() if size != 1) or 'one device'})"
    known = math.prod(size for size in sizes.values() if size != -1)
    for name, size in sizes.items():
        if size == -1:
            require(len(devices) % known == 0, f"{text}: {len(devices)} devices not divisible by {known}")
            sizes[name] = len(devices) // known
    needed = math.prod(sizes.values())
    require(needed == len(devices), f"{text} needs {needed} devices, {len(devices)} are there")
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=kinds, devices=devices)


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh) -> P:
    """Spec of an array with these logical axes; replicable axes that do not divide are replicated, others raise."""
    entries = []
    for name, size in zip(axes, shape, strict=True):
        mesh_axes = _mesh_axes(name, mesh)
        n = math.prod(mesh.shape[axis] for axis in mesh_axes)
        if size % n and name not in REPLICABLE:
            raise ConfigError(f"{name} ({size}) not divisible by mesh.{' * mesh.'.join(mesh_axes)} ({n})")
        entries.append(mesh_axes if mesh_axes and size % n == 0 else None)
    return P(*entries)


def param_shardings(info, mesh: Mesh):
    """Pytree of NamedSharding for `info`, the pytree of ParamInfo that `param_info(model)` gives."""

    def sharding(leaf) -> NamedSharding:
        axes = ("layers", *leaf.axes) if leaf.stacked else leaf.axes
        return NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))

    return jax.tree.map(sharding, info)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of [B, T] token arrays: rows over data, fsdp and expert. Ids are few: all of a row are everywhere."""
    return NamedSharding(mesh, P(RULES["batch"], None))


def axis_size(name: str) -> int:
    """Size of a mesh axis in the mesh that is set; 1 without one."""
    mesh = _current_mesh()
    return 1 if mesh is None else mesh.shape.get(name, 1)


def split_axes(name: str | None, size: int) -> tuple[str, ...]:
    """Mesh axes that split a dim of this logical axis and size; () without a mesh, or where they do not divide it.

    The stream is split by as many of its axes, outermost first, as divide it.
    """
    mesh = _current_mesh()
    return () if mesh is None else _dividing(name, size, mesh)


def is_split() -> bool:
    """Whether a mesh is set that splits anything here."""
    return _current_mesh() is not None


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` pinned to the sharding of its logical axes; axes that do not divide stay whole. Without a mesh: `x`."""
    mesh = _current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, _divisible_spec(axes, x.shape, mesh))


def gather_fsdp(w: jax.Array, dtype, axes: tuple[str | None, ...]) -> jax.Array:
    """A parameter as it is used: in `dtype`, whole over the fsdp axis, still split over tensor.

    The cast comes before the all-gather and, in the backward, the reduce-scatter before the cast: half the traffic.
    """
    return w.astype(dtype) if _current_mesh() is None else _gather_fsdp(w, np.dtype(dtype), axes)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_fsdp(w, dtype, axes):
    return constrain(w.astype(dtype), *(None if name == "d_model" else name for name in axes))


def _gather_fsdp_fwd(w, dtype, axes):
    return _gather_fsdp(w, dtype, axes), jax.numpy.zeros((0,), w.dtype)


def _gather_fsdp_bwd(dtype, axes, like, grad):
    return (constrain(grad, *axes).astype(like.dtype),)


_gather_fsdp.defvjp(_gather_fsdp_fwd, _gather_fsdp_bwd)


def repeat_for_heads(x: jax.Array, axis: int, n_heads: int) -> jax.Array:
    """Key/value heads or state groups repeated until the tensor axis divides them, so that each device has its own.

    Head h reads group h // (n_heads / groups) before and after. No change where the tensor axis divides them already.
    """
    shards, size = axis_size("tensor"), x.shape[axis]
    if n_heads % shards or size % shards == 0:
        return x
    return jax.numpy.repeat(x, math.lcm(size, shards) // size, axis=axis)


def per_device(
    fn: Callable,
    arrays: Sequence[jax.Array | None],
    axes: Sequence[tuple],
    out_axes,
    *,
    split_tokens: bool = False,
) -> jax.Array | tuple:
    """`fn(*arrays)`, run by every device on its share of rows and heads, and of tokens with split_tokens.

    axes: the logical axes of each array, of its leading dims where there are more names than dims; out_axes: of the
    result (a tuple of names) or the results (a list of tuples). A mesh axis splits either all the dims that it has in
    the table or, where one of them does not divide, none. Where tokens are split, fn gets a keyword, context_axis: the
    mesh axis that splits them, as the ops take it.
    """
    mesh = _current_mesh()
    if mesh is None:
        return fn(*arrays)
    indivisible = set() if split_tokens and mesh.shape.get("context", 1) > 1 else {"context"}
    for array, names in zip(arrays, axes, strict=True):
        for name, size in zip(names, () if array is None else array.shape):
            mesh_axes = _mesh_axes(name, mesh)
            if size % math.prod(mesh.shape[axis] for axis in mesh_axes):
                indivisible.update(mesh_axes)

    def spec(names):
        split = (tuple(a for a in _mesh_axes(name, mesh) if a not in indivisible) for name in names)
        return P(*(axes or None for axes in split))

    out_specs = tuple(spec(names) for names in out_axes) if isinstance(out_axes, list) else spec(out_axes)
    in_specs = tuple(
        P() if array is None else spec(names[: array.ndim]) for array, names in zip(arrays, axes, strict=True)
    )
    fn = fn if "context" in indivisible else partial(fn, context_axis="context")
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)


def manual(fn: Callable, arrays: Sequence[jax.Array], axes: Sequence[tuple], outs: tuple | list) -> jax.Array | tuple:
    """`fn(*arrays)`, run by every device on its shards, which fn exchanges itself: by `gather`, `scatter` and `add`.

    axes: the logical axes of each array; outs: (logical axes, shape) of the result, or a list of those. Dims that do
    not divide are whole on every device, as with `constrain`. Without a mesh: `fn(*arrays)`.
    """
    mesh = _current_mesh()
    if mesh is None:
        return fn(*arrays)
    in_specs = tuple(_divisible_spec(names, array.shape, mesh) for array, names in zip(arrays, axes, strict=True))
    spec = lambda out: _divisible_spec(*out, mesh)
    out_specs = tuple(map(spec, outs)) if isinstance(outs, list) else spec(outs)
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)


def products(fn: Callable, x, weights: Sequence[jax.Array], *, x_axes: tuple, weight_axes: Sequence[tuple], out_axes):
    """`fn(x, *weights)`: products of activations [B, T, ...] with parameters, each device with its own heads or widths.

    out_axes: of the result (a tuple of names) or of the results (a list). What the names ask for is exchanged once for
    all products, in the type of the arrays:
    - weights are gathered over the axes that split d_model, and their gradients scattered over them;
    - tokens of the stream are gathered where the results have whole `tokens`, and their gradient scattered;
    - sums over what `tensor` splits of x are scattered over the tokens where the result is the stream.
    """
    mesh = _current_mesh()
    if mesh is None:
        return fn(x, *weights)
    several = isinstance(out_axes, list)
    results = jax.eval_shape(fn, x, *weights)
    names = out_axes if several else [out_axes]
    stream, tokens = (_dividing(name, x.shape[1], mesh) for name in ("stream", "tokens"))
    over_tokens = tuple(axis for axis in stream if axis not in tokens)
    entering = over_tokens if x_axes[1] == "stream" and any(out[1] == "tokens" for out in names) else ()
    summed = tuple(a for name, n in zip(x_axes[2:], x.shape[2:], strict=True) for a in _dividing(name, n, mesh))
    if x_axes[1] == "tokens" and not summed:
        names = [tuple("tokens" if name == "stream" else name for name in out) for out in names]

    sharded = [
        [(dim, _dividing(name, w.shape[dim], mesh)) for dim, name in enumerate(axes) if name == "d_model"]
        for w, axes in zip(weights, weight_axes, strict=True)
    ]

    def run(x, *weights):
        x = gather(x, entering, 1)
        whole = [reduce(lambda w, at: gather(w, at[1], at[0]), dims, w) for w, dims in zip(weights, sharded)]
        result = fn(x, *whole)
        if not summed:
            return tuple(result) if several else result
        return scatter(result, summed, 1) if set(summed) == set(over_tokens) else add(result, summed)

    shapes = [result.shape for result in (results if several else [results])]
    outs = list(zip(names, shapes, strict=True))
    return manual(run, [x, *weights], [x_axes, *weight_axes], outs if several else outs[0])


def gather(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
    """Inside `manual`: shards of a dim put together over mesh axes, outermost first; the gradient is scattered."""
    axes = _wide(axes)
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x


def scatter(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
    """Inside `manual`: sums over mesh axes of which each device keeps its shard of a dim."""
    axes = _wide(axes)
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True) if axes else x


def add(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Inside `manual`: sums over mesh axes."""
    axes = _wide(axes)
    return jax.lax.psum(x, axes) if axes else x


def _wide(axes: Sequence[str]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)


def _current_mesh():
    """The mesh that is set, where it can split something here: more than one device, and not inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh


def _mesh_axes(name: str | None, mesh) -> tuple[str, ...]:
    return tuple(axis for axis in RULES.get(name, ()) if axis in mesh.shape)


def _divisible_spec(axes, shape, mesh) -> P:
    return P(*(_dividing(name, size, mesh) or None for name, size in zip(axes, shape, strict=True)))


def _dividing(name: str | None, size: int, mesh) -> tuple[str, ...]:
    """See `split_axes`."""
    axes = _mesh_axes(name, mesh)
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1] if name == "stream" else ()
    return axes
