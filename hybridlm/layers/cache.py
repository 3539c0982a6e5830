# SPDX-License-Identifier: Apache-2.0
"""What a cache is made of, and reading and writing a layer's share of it.

A mixer alone owns arrays [B, ...]; a scanned model stacks those of its repeats, [L, B, ...], and names the layer, so
that a write touches the layer's own entries only and the stacked array is updated in place. What is stored smaller than
it is computed with (`CacheTypes`) is an `Int8` or a `Rounded` in the place of an array; `read` and `write` know them.

Axis letters: B batch, T tokens, S slots, L layers, K key/value heads, P head width.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.fields import check_fields
from pallas_kernels import cache_write

ROWS = ("batch", None, "kv_heads")
"""Logical axes of what is kept of tokens, [B, S, K, P]."""


@dataclass(frozen=True)
class CacheTypes:
    """How a cache is stored; it is computed with in float32 and in the model's type whatever this says."""

    keys: Literal["bfloat16", "int8"] | None = None
    """Keys and values, in windows and of shared blocks too, and latents; int8 has a float32 scale for each head and
    token. None: in the type of the model."""
    states: Literal["bfloat16"] | None = None
    """Recurrent states: read and updated in float32, rounded when they are stored. None: float32."""

    def __post_init__(self):
        check_fields(self, "cache.")


AS_COMPUTED = CacheTypes()
"""Nothing is stored smaller."""


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=())
@dataclass(frozen=True)
class Int8:
    """Keys or values as whole numbers of -127..127 and a scale for each head and token; a pytree."""

    values: jax.Array
    """int8 [(L,) B, S, K, P]."""
    scales: jax.Array
    """float32 [(L,) B, K, S], tokens last: so that few heads fill no whole register of a TPU. What is meant is values *
    scales."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[(L,) B, S, K, P]."""
        return self.values.shape


@partial(jax.tree_util.register_dataclass, data_fields=("rounded",), meta_fields=())
@dataclass(frozen=True)
class Rounded:
    """A state that is computed in float32 and stored in bfloat16; a pytree."""

    rounded: jax.Array
    """bfloat16 [(L,) B, ...]."""


@dataclass(frozen=True)
class Layout:
    """How caches are made: stored in which types, of how many depths at once, split over the mesh that is set."""

    types: CacheTypes = AS_COMPUTED
    depths: int | None = None
    """L of stacked arrays; None: those of one mixer, without that axis."""

    def __post_init__(self):
        check_fields(self, "cache_")

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike, axes: tuple[str | None, ...] = ("batch",)) -> jax.Array:
        """Zeros [B, ...] of each depth. axes: logical axes, the rows' first; those that are not named are not split."""
        axes = (*axes, *(None,) * (len(shape) - len(axes)))
        if self.depths is not None:
            shape, axes = (self.depths, *shape), (None, *axes)
        return sharding.zeros(shape, dtype, axes)

    def state(self, shape: tuple[int, ...], axes: tuple[str | None, ...] = ("batch",)) -> Any:
        """A recurrent state that may be rounded, zero; arguments as of `zeros`."""
        if self.types.states is None:
            return self.zeros(shape, jnp.float32, axes)
        return Rounded(self.zeros(shape, self.types.states, axes))

    def keys(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """What is kept of tokens, [B, S, K, P], zero. dtype: that of the model."""
        if self.types.keys != "int8":
            return self.zeros(shape, self.types.keys or dtype, ROWS)
        batch, slots, heads, _ = shape
        scales = self.zeros((batch, heads, slots), jnp.float32, (ROWS[0], ROWS[2]))
        return Int8(self.zeros(shape, jnp.int8, ROWS), scales)


PLAIN = Layout()
"""Of a mixer by itself, stored as it is computed with."""


def make(module: Any, batch: int, max_len: int, layout: Layout) -> Any:
    """The cache of a mixer, link or sublayer. One whose `init_cache` takes no layout keeps its own types, and starts at
    zero; its rows are split."""
    if "layout" in inspect.signature(module.init_cache).parameters:
        return module.init_cache(batch, max_len, layout)
    return jax.tree.map(lambda a: layout.zeros(a.shape, a.dtype), module.init_cache(batch, max_len))


def entry(array: Any, layer: jax.Array | None) -> Any:
    """The layer's entries as they are stored; all where `layer` is None."""
    if layer is None:
        return array
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), array)


def read(array: Any, layer: jax.Array | None, dtype: DTypeLike | None = None) -> jax.Array:
    """The layer's entries, to be computed with: rounded states in float32. dtype: of keys and values; None: as they are
    stored, those of int8 in float32."""
    stored = entry(array, layer)
    if isinstance(stored, Rounded):
        return stored.rounded.astype(jnp.float32)
    if isinstance(stored, Int8):
        stored = stored.values.astype(jnp.float32) * jnp.swapaxes(stored.scales, -1, -2)[..., None]
    return stored if dtype is None else stored.astype(dtype)


def write(array: Any, layer: jax.Array | None, value: jax.Array) -> Any:
    """`array` with the layer's entries replaced."""
    if isinstance(array, Rounded):
        return Rounded(write(array.rounded, layer, value))
    value = value.astype(array.dtype)
    return value if layer is None else jax.lax.dynamic_update_index_in_dim(array, value, layer, 0)


def read_all(cache: dict[str, Any], layer: jax.Array | None) -> dict[str, jax.Array]:
    """`read` of every array."""
    return {name: read(array, layer) for name, array in cache.items()}


def write_all(cache: dict[str, Any], layer: jax.Array | None, new: dict[str, jax.Array]) -> dict[str, Any]:
    """`write` of every array."""
    return {name: write(cache[name], layer, new[name]) for name in cache}


def unless_padding(
    real_BT: jax.Array | None, new: dict[str, jax.Array], old: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The new arrays [B, ...] of rows whose one token is real, of others the old ones. real_BT: None: all real."""
    if real_BT is None:
        return new
    return {name: jnp.where(real_BT.reshape(-1, *(1,) * (a.ndim - 1)), a, old[name]) for name, a in new.items()}


def write_slots(array: Any, layer: jax.Array | None, slots_BT: jax.Array, value_BT: jax.Array) -> Any:
    """`array` [(L,) B, S, K, P] with value[b, t] at [b, slots[b, t]] of the layer; slots outside it are not written."""
    if isinstance(array, Int8):
        values, scales_BTK = in_int8(value_BT)
        values = write_slots(array.values, layer, slots_BT, values)
        return Int8(values, _write_scales(array.scales, layer, slots_BT, scales_BTK))
    rows = (*ROWS, None)
    names = (rows if layer is None else (None, *rows)), (), ("batch",), rows

    def write(array, layer, slots_BT, value_BT):
        return cache_write(array, slots_BT, value_BT, layer=layer)

    return sharding.per_device(write, (array, layer, slots_BT, value_BT), names, names[0])


def _write_scales(scales: jax.Array, layer: jax.Array | None, slots_BT: jax.Array, scales_BTK: jax.Array) -> jax.Array:
    """`scales` [(L,) B, K, S] with those of tokens at their slots, as `write_slots`."""
    rows = ("batch", "kv_heads", None)
    names = (rows if layer is None else (None, *rows)), (), ("batch",), ROWS

    def write(scales, layer, slots_BT, scales_BTK):
        n_batch, _, n_heads = scales_BTK.shape
        at = jnp.arange(n_batch)[:, None, None], jnp.arange(n_heads)[None, None, :], slots_BT[:, :, None]
        at = at if layer is None else (layer, *at)
        return scales.at[at].set(scales_BTK, mode="drop", wrap_negative_indices=False)

    return sharding.per_device(write, (scales, layer, slots_BT, scales_BTK), names, names[0])


def in_int8(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 [..., P], float32 scale [...]) of vectors [..., P]: their largest number becomes 127. Vectors that are not
    finite come back so."""
    value = value.astype(jnp.float32)
    scale = jnp.max(jnp.abs(value), axis=-1) / 127
    return jnp.round(value / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8), scale


def as_stored(array: Any, value: jax.Array) -> jax.Array:
    """`value` [..., P], in its own type, as `read` gives it once it was written to `array`."""
    if isinstance(array, Int8):
        values, scale = in_int8(value)
        return (values.astype(jnp.float32) * scale[..., None]).astype(value.dtype)
    return value.astype(array.dtype).astype(value.dtype)


class Next(NamedTuple):
    """The next tokens of rows whose earlier ones are in a cache."""

    length_B: jax.Array
    """Tokens in the cache."""
    real_BT: jax.Array
    """False for padding."""
    position_BT: jax.Array
    """Positions of the real tokens."""
    gaps: bool
    """Whether padding may stand in front of real tokens."""
    whole: bool = False
    """Whether it is known that all are real."""

    @classmethod
    def tokens(cls, x_BTD: jax.Array, length_B: jax.Array, real_BT: jax.Array | None, gaps: bool) -> "Next":
        """The tokens of x behind `length_B` others; real_BT and gaps as of `block.Mixer.extend`."""
        shape = x_BTD.shape[:2]
        gaps, whole = gaps and real_BT is not None and shape[1] > 1, real_BT is None
        real_BT = jnp.ones(shape, bool) if real_BT is None else real_BT
        before_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - real_BT
        index_BT = before_BT if gaps else jnp.arange(shape[1], dtype=jnp.int32)[None]
        return cls(length_B, real_BT, length_B[:, None] + index_BT, gaps, whole)

    def store(self, config, cache: dict, layer, k: jax.Array, v: jax.Array) -> tuple:
        """(keys, values, the cache after them, where queries and keys stand, as `ops.attention` takes it).

        config: with the window. Position p is stored in slot p mod S. k, v: of the tokens, [B, T, K, P]."""
        ring, slots, (batch, tokens) = config.window is not None, cache["k"].shape[-3], self.real_BT.shape
        length_B, real_BT, position_BT, gaps, whole = self
        end_B = length_B + real_BT.sum(axis=1, dtype=jnp.int32)
        stored_BT = real_BT & (position_BT >= end_B[:, None] - slots) if ring else real_BT
        slot_BT = jnp.where(stored_BT, position_BT % slots if ring else position_BT, slots)
        new = {name: write_slots(cache[name], layer, slot_BT, a) for name, a in (("k", k), ("v", v))}
        if not ring:
            real_BS = jnp.arange(slots)[None] < end_B[:, None]
            places = {"q_offset": length_B, "layer": layer}
            if gaps:
                slot_BS = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots))
                places = {"positions": (position_BT, slot_BS), "layer": layer}
            k, v = new["k"], new["v"]
        elif tokens == 1:
            position_BS, real_BS = _ring_positions(end_B, slots)
            places = {"positions": (position_BT, position_BS), "layer": layer}
            k, v = new["k"], new["v"]
        else:  # the first queries see keys whose slots the last tokens take: the old ring and the new tokens, apart
            position_BS, real_BS = _ring_positions(length_B, slots)
            places = {"positions": (position_BT, jnp.concatenate([position_BS, position_BT], axis=1))}
            real_BS = jnp.concatenate([real_BS, real_BT], axis=1)
            both = ((cache["k"], k), (cache["v"], v))
            pairs = ((read(old, layer, a.dtype), as_stored(old, a)) for old, a in both)
            k, v = (jnp.concatenate(pair, axis=1) for pair in pairs)
        ids = real_BT.astype(jnp.int32), real_BS.astype(jnp.int32)
        places["segment_ids"] = (None, None) if whole and not ring else ids  # all before it
        return k, v, new, places


def _ring_positions(length_B: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Position [B, S] that each slot of a ring holds after `length_B` tokens, and whether it holds one."""
    slot_S = jnp.arange(slots, dtype=jnp.int32)
    last_B1 = length_B[:, None] - 1
    position_BS = last_B1 - (last_B1 - slot_S[None]) % slots
    return position_BS, position_BS >= 0
