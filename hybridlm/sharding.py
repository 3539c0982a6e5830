# SPDX-License-Identifier: Apache-2.0
"""From logical axes to mesh axes: one table, and everything that reads it.

Sharding is GSPMD's (Auto axes): arrays carry shardings, `constrain` pins activations, and the sequence ops, which the
compiler cannot split by itself, run per device on their rows and heads through `per_device`. The mesh is the one of
`jax.set_mesh`; without one, or with one device, every function here that takes arrays gives them back as they are.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybridlm.errors import ConfigError, require
from hybridlm.fields import check_fields
from pallas_kernels.platform import platform, platform_of

RULES = {
    "batch": ("slice", "data", "fsdp", "expert"),
    "tokens": ("context",),
    "stream": ("context", "tensor"),  # tokens between sublayers, where every token is by itself
    "rows": ("slice", "data", "fsdp", "expert", "tensor"),  # rows there, where `stream_axes` has tensor split them
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
REPLICABLE = frozenset({"kv_heads", "groups", "batch", "rows"})
"""Axes that are kept whole on every device where their size is not divisible by the mesh axes; others must divide."""
STREAM = ("batch", "stream", None)
"""Logical axes of the residual stream [B, T, D]; `stream_axes` says what its first two stand for."""
Axis = str | tuple[str, ...] | None  # the logical axis of a dim, or the mesh axes that split it
MESH_AXES = tuple(dict.fromkeys(axis for axes in RULES.values() for axis in axes))
"""The mesh's axes, outermost first, as RULES names them first: neighbours along the last are nearest to each other.

A new axis is a field of MeshConfig and an entry in RULES.
"""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; one of the axes, beside `slice`, may be -1: all devices that the others leave."""

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
    slice: int = 1
    """Replicas on slices of a TPU that a slower network joins; rows are split over them; -1: as many as JAX reports."""

    def __post_init__(self):
        check_fields(self, "mesh.")
        sizes = asdict(self)
        for name, size in sizes.items():
            require(size >= 1 or size == -1, f"mesh.{name} ({size}) must be at least 1, or -1 for all that is left")
        within = [size for name, size in sizes.items() if name != "slice"]
        require(within.count(-1) <= 1, f"mesh ({sizes}): only one axis can be -1, beside slice")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with the axes of MESH_AXES over `devices` (all by default), neighbours along the last axes nearest.

    An axis of size -1 takes what the others leave, `slice` what JAX reports. On TPUs an axis lies along whole axes of
    the torus where it can and splits them where it must, so every product that is the number of devices works, and
    `slice` alone crosses from slice to slice. ConfigError, with the nearest meshes that fit, where it is not.
    """
    devices = jax.devices() if devices is None else list(devices)
    of_slice = Counter(getattr(device, "slice_index", 0) for device in devices)
    n_slices = len(of_slice)
    wanted = {name: getattr(config, name) for name in MESH_AXES}
    if wanted["slice"] == -1:
        wanted["slice"] = n_slices
    apart = n_slices > 1 and wanted["slice"] % n_slices == 0 and len(set(of_slice.values())) == 1
    if platform_of(devices[0]) == "tpu" and n_slices > 1:
        said = f"mesh.slice ({wanted['slice']}): the {len(devices)} devices are of {n_slices} slices"
        require(apart, f"{said}: give --mesh.slice={n_slices}, or -1, on slices of one size")
    sizes = _fitting(wanted, len(devices))
    try:
        if apart:
            across = [n_slices if name == "slice" else 1 for name in MESH_AXES]
            within = [size // n for size, n in zip(sizes.values(), across, strict=True)]
            arranged = create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
        else:
            arranged = create_device_mesh(list(sizes.values()), devices, allow_split_physical_axes=True)
    except AssertionError as error:  # a part of a slice that is no box
        raise ConfigError(
            f"mesh ({_product(sizes)}): the {len(devices)} devices cannot be arranged: they are no whole slice, and "
            "no box of one"
        ) from error
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _fitting(wanted: Mapping[str, int], n_devices: int) -> dict[str, int]:
    """The sizes with that of an axis of size -1 filled in; ConfigError where their product is not n_devices."""
    text = f"mesh ({_product(wanted)})"
    known = math.prod(size for size in wanted.values() if size != -1)
    if -1 in wanted.values():
        fits, problem = n_devices % known == 0, f"{text}: {n_devices} devices not divisible by {known}"
    else:
        fits, problem = known == n_devices, f"{text} needs {known} devices, {n_devices} are there"
    require(fits, f"{problem}; nearest that fit: {'' if fits else _nearest(wanted, n_devices)}")
    return {name: n_devices // known if size == -1 else size for name, size in wanted.items()}


def _product(sizes: Mapping[str, int]) -> str:
    """`data 2 x fsdp 4`."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "one device"


def _nearest(wanted: Mapping[str, int], n_devices: int) -> str:
    """The meshes of n_devices devices whose sizes are the fewest doublings away from the wanted ones, three at most.

    Slices are not to be chosen: their number stays if it can.
    """
    fixed = {"slice": wanted["slice"]} if n_devices % wanted["slice"] == 0 else {}
    names = [name for name, size in wanted.items() if name not in fixed and (size != 1 or name in ("data", "fsdp"))]

    def doublings(sizes: tuple[int, ...]) -> tuple[float, int]:
        """Of two as far away, that which changes fewer axes is nearer."""
        pairs = [(size, wanted[name]) for name, size in zip(names, sizes, strict=True) if wanted[name] != -1]
        return round(sum(abs(math.log2(a / b)) for a, b in pairs), 6), sum(a != b for a, b in pairs)

    fitting = _factorisations(n_devices // math.prod(fixed.values()), len(names))
    best = sorted(fitting, key=doublings)[:3]
    return ", or ".join(_product(fixed | dict(zip(names, sizes, strict=True))) for sizes in best)


def _factorisations(n: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write n as an ordered product of `parts` numbers."""
    if parts == 1:
        return [(n,)]
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return [(d, *rest) for d in divisors for rest in _factorisations(n // d, parts - 1)]


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

    axes = lambda leaf: ("layers", *leaf.axes) if leaf.stacked else leaf.axes
    return jax.tree.map(lambda leaf: NamedSharding(mesh, partition_spec(axes(leaf), leaf.shape, mesh)), info)


def whole_shardings(info, mesh: Mesh):
    """`param_shardings` whole over the axes that split d_model, but for experts, which are gathered by themselves."""
    split = set(RULES["d_model"])

    def sharding(leaf, at: NamedSharding) -> NamedSharding:
        if "experts" in leaf.axes:
            return at
        axes = ((entry,) if isinstance(entry, str) else entry or () for entry in at.spec)
        entries = (tuple(axis for axis in of_dim if axis not in split) or None for of_dim in axes)
        return NamedSharding(mesh, P(*entries))

    return jax.tree.map(sharding, info, param_shardings(info, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of [B, T] token arrays: rows over slice, data, fsdp and expert. Ids are few: a row is everywhere."""
    return NamedSharding(mesh, P(RULES["batch"], None))


def axis_size(name: str) -> int:
    """Size of a mesh axis in the mesh that is set; 1 without one."""
    mesh = _current_mesh()
    return 1 if mesh is None else mesh.shape.get(name, 1)


def split_axes(name: Axis, size: int) -> tuple[str, ...]:
    """Mesh axes that split a dim of this logical axis and size; () without a mesh, or where they do not divide it.

    The stream is split by as many of its axes, outermost first, as divide it.
    """
    mesh = _current_mesh()
    return () if mesh is None else _dividing(name, size, mesh)


def dims_axes(axes: Sequence[Axis], shape: Sequence[int]) -> list[tuple[str, ...]]:
    """`split_axes` of each dim of an array with these logical axes, those of the stream among them."""
    if tuple(axes[:2]) == STREAM[:2]:
        axes = (*stream_axes(*shape[:2]), *axes[2:])
    return [split_axes(name, size) for name, size in zip(axes, shape, strict=True)]


def stream_axes(rows: int, tokens: int) -> tuple[str, str]:
    """Logical axes of the first two dims of a stream [B, T, ...] of this size.

    `tensor` splits its rows where it could split its tokens and the rows divide, but on a TPU: shards of the outermost
    dim lie as the whole does, so that a GPU puts them together, or sums and cuts, without moving all tokens first.
    """
    sizes = (("stream", tokens), ("rows", rows))
    divides = axis_size("tensor") > 1 and all("tensor" in split_axes(name, size) for name, size in sizes)
    return ("rows", "tokens") if divides and platform() != "tpu" else STREAM[:2]


def stream_split(rows: int, tokens: int) -> tuple[int, tuple[str, ...]]:
    """(dim, mesh axes): what splits a stream [B, T, ...] of this size beyond what splits its batch and tokens."""
    both = zip(*(dims_axes(names, (rows, tokens)) for names in (STREAM[:2], ("batch", "tokens"))), strict=True)
    more = [tuple(axis for axis in split if axis not in whole and axis_size(axis) > 1) for split, whole in both]
    return (0, more[0]) if more[0] else (1, more[1])


def mesh_in_force() -> Mesh | None:
    """That of `jax.set_mesh`, with its devices; None where none is set. Not inside a jitted function."""
    mesh = jax.sharding.get_mesh()
    return mesh if isinstance(mesh, Mesh) and not mesh.empty else None


def is_split() -> bool:
    """Whether a mesh is set that splits anything here."""
    return _current_mesh() is not None


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """`x` pinned to the sharding of its logical axes; axes that do not divide stay whole. Without a mesh: `x`."""
    spec = P(*(of_dim or None for of_dim in dims_axes(axes, x.shape)))
    return jax.lax.with_sharding_constraint(x, spec) if is_split() else x


def zeros(shape: tuple[int, ...], dtype, axes: tuple[str | None, ...]) -> jax.Array:
    """Zeros that are split over the mesh from the start, as `constrain` splits: no device ever holds more than its
    share."""
    return _split_zeros(shape, np.dtype(dtype), axes) if is_split() else jax.numpy.zeros(shape, dtype)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _split_zeros(shape: tuple[int, ...], dtype: np.dtype, axes: tuple[str | None, ...]) -> jax.Array:
    return constrain(jax.numpy.zeros(shape, dtype), *axes)


def gather_fsdp(w: jax.Array, dtype, axes: tuple[str | None, ...]) -> jax.Array:
    """A parameter as it is used: in `dtype`, whole over the fsdp axis, still split over tensor.

    The cast comes before the all-gather and, in the backward, the reduce-scatter before the cast: half the traffic.
    Where `weights_are_whole`, vectors are, and their gradients.
    """
    is_whole = _current_mesh() is None or (axes == ("d_model",) and weights_are_whole())
    return w.astype(dtype) if is_whole else _gather_fsdp(w, np.dtype(dtype), axes)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_fsdp(w, dtype, axes):
    return constrain(w.astype(dtype), *(None if name == "d_model" else name for name in axes))


def _gather_fsdp_bwd(dtype, axes, like, grad):
    return (constrain(grad, *axes).astype(like.dtype),)


_gather_fsdp.defvjp(
    lambda w, dtype, axes: (_gather_fsdp(w, dtype, axes), jax.numpy.zeros((0,), w.dtype)), _gather_fsdp_bwd
)


_WHOLE: ContextVar[bool] = ContextVar("weights_are_whole", default=False)


def weights_are_whole() -> bool:
    """Whether products find their matrices whole over the axes that split d_model: see `whole_weights`."""
    return _WHOLE.get()


@contextmanager
def whole_weights() -> Iterator[None]:
    """Within, programs are traced whose matrices were put together before: products gather none. It changes no result,
    as shards would be put together where they are not."""
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


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
) -> Any:
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
    return shard_map(fn, in_specs, out_specs)(*arrays)


def shard_map(fn: Callable, in_specs, out_specs) -> Callable:
    """`jax.shard_map` over all axes of the mesh that are not taken by `per_slice`."""
    mesh = _current_mesh()
    names = {axis for axis in mesh.axis_names if _is_auto(axis, mesh)}
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)


def per_slice(fn: Callable, whole, rows):
    """`fn(whole, rows)` -> (apart, summed), run by every slice on its share of rows: (apart stacked by slice, sums).

    whole, rows and the results are pytrees; what is summed crosses from slice to slice once, after fn is through. The
    other axes are the compiler's as outside of it.
    """

    def of_slice(whole, rows):
        apart, summed = fn(whole, rows)
        return jax.tree.map(lambda x: x[None], apart), jax.lax.psum(summed, "slice")

    specs: dict[str, Any] = {"in_specs": (P(), P("slice")), "out_specs": (P("slice"), P())}
    return jax.shard_map(of_slice, **specs, axis_names={"slice"}, check_vma=False)(whole, rows)


def _current_mesh():
    """The mesh that is set, where it can split something here: more than one device, and not inside a shard_map but
    that of per_slice."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not all(_is_auto(axis, mesh) for axis in mesh.axis_names if axis != "slice"):
        return None
    return mesh


def _is_auto(axis: str, mesh) -> bool:
    return mesh.axis_types[mesh.axis_names.index(axis)] == AxisType.Auto


def _mesh_axes(name: Axis, mesh) -> tuple[str, ...]:
    axes = name if isinstance(name, tuple) else RULES.get(name or "", ())
    return tuple(axis for axis in axes if axis in mesh.shape and _is_auto(axis, mesh))


def _dividing(name: Axis, size: int, mesh) -> tuple[str, ...]:
    """See `split_axes`."""
    axes = _mesh_axes(name, mesh)
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1] if name == "stream" else ()
    return axes
