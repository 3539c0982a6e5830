# SPDX-License-Identifier: Apache-2.0
"""How large a model's cache is, by what it holds, counted from shapes: no parameter is drawn, nothing is compiled.

What an array of a cache is follows from how it behaves: with more tokens it grows without end (keys and values, or what
the block says in GROWS), up to a window, or not at all. What does not grow is a state where it is float32 in a bfloat16
model, or rounded, and else the last inputs of a convolution.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from hybridlm.errors import require
from hybridlm.fields import WHOLE
from hybridlm.layers import Attention, LatentAttention
from hybridlm.layers import cache as caches
from hybridlm.layers.block import Block, Make, grown, of_streams, shares, walk
from hybridlm.layers.cache import AS_COMPUTED, CacheTypes, Layout
from hybridlm.layers.params import param_info
from hybridlm.model.config import ModelConfig
from hybridlm.model.init import check_model
from hybridlm.model.sublayer import Sublayer
from hybridlm.sharding import MESH_AXES, RULES, MeshConfig

KEYS, WINDOWED, SHARED = "keys and values", "keys and values in a window", "keys and values of shared blocks"
STATES, WINDOWS, LENGTHS = "recurrent states", "windows of convolutions", "lengths of rows"
LATENTS = LatentAttention.GROWS["latent"]
FAR = 2**28
"""Tokens: more than any window has, and twice as many can be counted."""
SCALES = ("batch", "kv_heads", None)
"""Logical axes of scales of int8."""
LENGTH_BYTES = 4
"""Of a row: the number of its tokens, int32."""


@dataclass(frozen=True)
class Part:
    """One array of a symbol's cache, of all depths of the symbol together."""

    symbol: str
    """Of the pattern; empty for the lengths of rows."""
    name: str
    """Its dotted way in the symbol's cache."""
    kind: str
    """What it holds."""
    dtype: str
    """Its type."""
    depths: int
    """Sublayers that have one."""
    constant: int
    """Bytes of a row of whatever length, once its windows are full; prefix tokens are among them."""
    per_token: int
    """Bytes more for each token of a row."""
    row_bytes: int
    """Bytes of a row of the length that was asked for."""
    axes: tuple[str | None, ...] = ()
    """Logical axes of it at one depth, the rows' first."""
    shape: tuple[int, ...] = ()
    """Of one row, at that length."""


class Total(NamedTuple):
    """Of some parts; bytes."""

    sublayers: int
    """That have any of them."""
    constant: int
    """Of a row, see Part."""
    per_token: int
    """Of a row, see Part."""
    bytes: int
    """Of all rows at the length that was asked for."""
    device_bytes: int
    """Of them on one device."""


@dataclass(frozen=True)
class CacheSize:
    """The cache of `batch` rows of up to `context` tokens, as `HybridLM.init_cache(batch, context)` makes it."""

    batch: int
    context: int
    parts: tuple[Part, ...]
    mesh: Mapping[str, int]
    """Mesh axis -> size, of axes that split something."""
    types: CacheTypes = AS_COMPUTED
    """How it is stored."""

    @property
    def kinds(self) -> dict[str, Total]:
        """By what is held, that of which a token adds most first."""
        found = {part.kind: self.total(part.kind) for part in self.parts}
        return dict(sorted(found.items(), key=lambda item: (-item[1].per_token, -item[1].bytes)))

    def total(self, *kinds: str) -> Total:
        """Of these kinds; of all where none is named."""
        parts = [part for part in self.parts if not kinds or part.kind in kinds]
        depths = {part.symbol: part.depths for part in parts}
        shards = [_shards(part, self.batch, self.mesh) for part in parts]
        return Total(
            sum(depths.values()),
            sum(part.constant for part in parts),
            sum(part.per_token for part in parts),
            self.batch * sum(part.row_bytes for part in parts),
            sum(self.batch * part.row_bytes // n for part, n in zip(parts, shards, strict=True)),
        )

    @property
    def of_tokens(self) -> Total:
        """What is kept of tokens: the kinds that grow with a row, up to a window or without end."""
        kinds = {part.kind for part in self.parts if part.kind in (WINDOWED, SHARED) or part.per_token}
        return self.total(*kinds) if kinds else Total(0, 0, 0, 0, 0)

    @property
    def dtypes(self) -> dict[str, str]:
        """Type of each kind: of several, as numbers and their scales are, that of most bytes first."""
        found: dict[str, dict[str, None]] = {}
        for part in sorted(self.parts, key=lambda part: -part.row_bytes):
            found.setdefault(part.kind, {})[part.dtype] = None
        return {kind: " + ".join(names) for kind, names in found.items()}

    @property
    def rows_split(self) -> bool:
        """Whether the mesh divides the rows; where it does not, every device keeps all of them."""
        return self.batch % _product(self.mesh, "batch") == 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes, of all sublayers."""
        kinds = {name: {"dtype": self.dtypes[name], **total._asdict()} for name, total in self.kinds.items()}
        return {"batch": self.batch, "context": self.context, "mesh": dict(self.mesh), "types": asdict(self.types),
                "kinds": kinds, "total": self.total()._asdict()}  # fmt: skip


def cache_size(
    model: ModelConfig, batch: int, context: int, mesh: MeshConfig | None = None, types: CacheTypes = AS_COMPUTED
) -> CacheSize:
    """Of a model's cache. mesh: None: one device; an axis of size -1 counts as 1. types: how it is stored.

    ConfigError for a bidirectional model, numbers out of range, and a mesh that cannot split the model.
    """
    ahead, prefix = model.sees_ahead, model.prefix_tokens
    require(not ahead, f"the model cannot be decoded token by token, and has no cache: {ahead}")
    for name, value, most in (("batch", batch, WHOLE), ("context", context, WHOLE - prefix)):
        require(1 <= value <= most, f"{name} ({value}) must be between 1 and {most}")
    sizes = {} if mesh is None else {axis: max(1, getattr(mesh, axis)) for axis in MESH_AXES}
    _check_mesh(model, sizes)
    return _size(model, batch, context, sizes, types)


def _size(model: ModelConfig, batch: int, context: int, sizes: Mapping[str, int], types: CacheTypes) -> CacheSize:
    """Of a model that has a cache. sizes: of mesh axes."""
    parts = [part for symbol in dict.fromkeys(model.pattern) for part in _of_symbol(model, symbol, context, types)]
    parts.append(Part("", "length", LENGTHS, "int32", 0, LENGTH_BYTES, 0, LENGTH_BYTES, ("batch",), (1,)))
    return CacheSize(batch, context, tuple(parts), {axis: n for axis, n in sizes.items() if n > 1}, types)


class Transformer(NamedTuple):
    """A model of the same width and depth whose mixers are all attention over all tokens."""

    attention: str
    """Which attention, in words."""
    mixers: int
    """Sublayers that are replaced by it, or were it before; feed-forwards stay."""
    size: CacheSize


def transformer_beside(model: ModelConfig, size: CacheSize) -> Transformer:
    """The transformer of a model's size, and its cache, stored in the same types. size: of the model, see `cache_size`.

    Its attention is the config's own: of the pattern's blocks, and of those inside them, the one that keeps most of a
    token, without its window. A config without any gets d_model in heads, of which up to 8 are of keys and values.
    """
    own = [
        (name, inside)
        for symbol in dict.fromkeys(model.pattern)
        for name, inside in walk(model.blocks[symbol], f"model.blocks.{symbol}")
        if inside.MIXES_TOKENS and list(walk(inside)) == [("", inside)]
    ]
    found = [(_kept_of_token(model, block), name, block) for name, block in own]
    kept, words, block = max(found, key=lambda item: item[0], default=(0, "", Attention()))
    if not kept:
        words, block = default_attention(model.d_model)
    elif getattr(block, "window", None) is not None:
        words += ", without its window"
    mixers = sum(mixes(model.blocks[symbol], model.d_model) for symbol in model.pattern)
    one = ModelConfig(
        d_model=model.d_model, pattern="*", blocks={"*": _everywhere(block)}, compute_dtype=model.compute_dtype
    )
    of_one = _size(one, size.batch, size.context, size.mesh, size.types)
    parts = [_times(part, mixers) if part.symbol else part for part in of_one.parts]
    return Transformer(words, mixers, replace(of_one, parts=tuple(parts if mixers else parts[-1:])))


def mixes(block: Block, d_model: int) -> bool:
    """Whether the block is a mixer: tokens meet in it, and it is no feed-forward that reads the token before too."""
    axes = {axis for _, _, axis in block.split(d_model)}
    return bool(block.MIXES_TOKENS) and axes != {"d_ff"} and not of_streams(block)


def default_attention(d_model: int) -> tuple[str, Attention]:
    """(in words, attention of a width): of a config that has none of its own."""
    d_head = next(width for width in (128, 64, 32, 16, 8, 4, 2, 1) if d_model % width == 0)
    n_heads = d_model // d_head
    block = Attention(n_heads=n_heads, n_kv_heads=math.gcd(n_heads, 8), d_head=d_head, rope=None)
    plural = "" if n_heads == 1 else "s"
    return f"none in the config: {n_heads} head{plural} of {d_head}, {block.kv_heads} of keys and values", block


def _of_symbol(model: ModelConfig, symbol: str, context: int, types: CacheTypes) -> list[Part]:
    """Of all depths of a symbol."""
    build = functools.partial(_sublayer, model, symbol)
    linked = shares(model.blocks[symbol])
    names, counts = grown(model.blocks[symbol]), (context + model.prefix_tokens, model.prefix_tokens)
    arrays = _arrays(build, model.compute_dtype, names, *counts, linked, types)
    return [_times(replace(part, symbol=symbol), model.pattern.count(symbol)) for part in arrays]


@functools.cache
def _sublayer(model: ModelConfig, symbol: str, dtype: str) -> Sublayer:
    """One of a symbol without its values, of activations of that type: made once for all lengths of context."""
    in_type: dict[str, Any] = {"compute_dtype": dtype}
    return nnx.eval_shape(lambda: Sublayer(symbol, replace(model, **in_type), rngs=nnx.Rngs(0)))


def _kept_of_token(model: ModelConfig, block: Block) -> int:
    """Bytes that a block keeps of a token as attention does; 0 of one that does not, or lets only some of it."""

    def build(dtype: str) -> nnx.Module:
        return nnx.eval_shape(lambda: _everywhere(block).build(model.d_model, Make(nnx.Rngs(0), dtype=dtype)))

    parts = _arrays(build, model.compute_dtype, grown(block), 1, 0, False, AS_COMPUTED)
    return sum(part.per_token for part in parts if part.kind in (KEYS, LATENTS))


def _everywhere(block: Any) -> Any:
    """The block without its window."""
    return replace(block, window=None) if getattr(block, "window", None) is not None else block


def _arrays(
    build: Callable[[str], nnx.Module], dtype: str, names: Mapping[str, str], n_tokens: int, n_prefix: int,
    linked: bool, types: CacheTypes,
) -> list[Part]:  # fmt: skip
    """Of the cache of a module at one depth. build: it, without values, by the type of its activations; names: see
    `block.grown`; n_tokens: of a row, n_prefix prefix tokens among them; linked: the cache is that of a mixer and of a
    link."""
    module = build(dtype)
    halved = module if dtype == "bfloat16" else build("bfloat16")
    lengths = 1, FAR, FAR + 1, n_tokens
    sizes = [_cache(module, n, types) for n in lengths]
    found = []
    for (path, near), (_, far), (_, further), (_, asked), (_, half) in zip(
        *sizes, _cache(halved, 1, types), strict=True
    ):
        per_token = _bytes(further) - _bytes(far)
        grows, rings = per_token > 0, _bytes(far) > _bytes(near)
        if linked and path[0] == "shared" and rings:
            kind = SHARED
        elif grows:
            kind = next((names[name] for name in path if name in names), KEYS)
        elif rings:
            kind = WINDOWED
        else:
            kind = STATES if half.dtype == np.float32 or path[-1] == "rounded" else WINDOWS
        axes = SCALES if path[-1] == "scales" else _axes(kind, rings, asked.shape, module)
        constant = _bytes(far) - per_token * (FAR - n_prefix)
        found.append(
            Part("", ".".join(path), kind, asked.dtype.name, 1, constant, per_token, _bytes(asked), axes, asked.shape)
        )
    return found


def _cache(module: nnx.Module, n_tokens: int, types: CacheTypes) -> list[tuple[tuple[str, ...], jax.ShapeDtypeStruct]]:
    """(way, shape and type) of the arrays of the cache of one row."""
    graphdef, state = nnx.split(module)

    def init(state: nnx.State) -> Any:
        return caches.make(nnx.merge(graphdef, state), 1, n_tokens, Layout(types))

    cache = jax.eval_shape(init, state)
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return [(tuple(map(_name, path)), leaf) for path, leaf in leaves]


def _name(key: Any) -> str:
    """Of a key in a path of a pytree: of a dict, a list or a dataclass."""
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))


def _axes(kind: str, of_tokens: bool, shape: tuple[int, ...], module: nnx.Module) -> tuple[str | None, ...]:
    """Logical axes as the ops have them: keys and values by heads, states by their first axis, windows as the channels
    of their convolutions."""
    rest = len(shape) - 1
    if of_tokens:
        return ("batch", None, "kv_heads", *(None,) * (rest - 2))[: rest + 1]
    if kind == STATES:
        first = next((i for i, n in enumerate(shape[1:]) if n > 1), 0)
        return "batch", *("heads" if i == first else None for i in range(rest))
    info = [leaf for leaf in jax.tree.leaves(param_info(module)) if leaf.kind == "conv"]
    channels = {leaf.shape[:-1]: leaf.axes[:-1] for leaf in info}
    return ("batch", None, *channels.get(shape[2:], (None,) * (rest - 1)))[: rest + 1]


def _times(part: Part, depths: int) -> Part:
    """A part of one depth, of so many."""
    return replace(
        part, depths=depths, constant=depths * part.constant, per_token=depths * part.per_token,
        row_bytes=depths * part.row_bytes,
    )  # fmt: skip


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _product(mesh: Mapping[str, int], logical: str | None) -> int:
    return math.prod(mesh.get(axis, 1) for axis in RULES.get(logical or "", ()))


def _shards(part: Part, batch: int, mesh: Mapping[str, int]) -> int:
    """Of how many devices each has a share of its own; axes that do not divide stay whole."""
    sizes: Iterable[tuple[str | None, int]] = zip(part.axes, (batch, *part.shape[1:]), strict=True)
    return math.prod(n for axis, size in sizes if size % (n := _product(mesh, axis)) == 0)


def _check_mesh(model: ModelConfig, sizes: Mapping[str, int]) -> None:
    """ConfigError where a mesh of these sizes cannot split the model."""
    mesh: Any = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes)) if sizes else None
    if mesh is not None:
        check_model(model, mesh)


def as_json(size: CacheSize, beside: Transformer) -> dict[str, Any]:
    """Both for JSON, with the parts that the first is made of."""
    parts = [{k: v for k, v in asdict(part).items() if k not in ("axes", "shape")} for part in size.parts]
    of_transformer = {"attention": beside.attention, "mixers": beside.mixers, **beside.size.as_dict()}
    return {**size.as_dict(), "parts": parts, "transformer": of_transformer}
