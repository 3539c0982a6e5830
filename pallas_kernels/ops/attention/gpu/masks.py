# SPDX-License-Identifier: Apache-2.0
"""What the Hopper kernels of attention are told about masks: bounds of every query, ranges of blocks.

A query sees the keys with start <= position < end and an id equal to its own. From the extremes of these within a block
follows which pairs of blocks have anything visible, and which everything. Arrays are NumPy where nothing is traced.

Axis letters beyond hybridlm's: M is B or 1, Q query blocks, J key blocks.
"""

import typing

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ops.attention.mask import Mask, query_positions

_LOW, _HIGH = np.iinfo(np.int32).min, np.iinfo(np.int32).max


class Bounds(typing.NamedTuple):
    """A mask by queries and keys: int32 arrays [B or 1, T] or [B or 1, S], all with the same first axis."""

    start_MT: jax.Array | np.ndarray
    end_MT: jax.Array | np.ndarray
    q_ids_MT: jax.Array | np.ndarray | None  # None: no ids
    k_ids_MS: jax.Array | np.ndarray | None  # never 0: padding is -1
    k_position_MS: jax.Array | np.ndarray | None  # None: the index


class Vectors(typing.NamedTuple):
    """What a kernel reads of a mask."""

    queries: jax.Array | np.ndarray  # see query_rows
    keys: jax.Array | np.ndarray | None  # see key_rows
    key_ranges: jax.Array | np.ndarray
    query_ranges: jax.Array | np.ndarray


def make_bounds(mask: Mask, n_queries: int, n_keys: int) -> Bounds:
    """Bounds of every query."""
    q_position, k_position = query_positions(mask, n_queries), mask.k_position_BS
    xp = _module(q_position)
    first, behind = (0, n_keys) if k_position is None else (_LOW, _HIGH)
    window, causal = mask.window, mask.causal
    start = xp.full_like(q_position, first) if window is None else xp.maximum(q_position - window + 1, first)
    end = xp.minimum(q_position + 1, behind) if causal else xp.full_like(q_position, behind)
    q_ids, k_ids = mask.q_ids_BT, mask.k_ids_BS
    if mask.has_ids:
        k_ids = _module(k_ids).where(k_ids == 0, -1, k_ids)
        start, end = (_module(q_ids).where(q_ids == 0, 0, array) for array in (start, end))
    arrays = (start, end, q_ids, k_ids, k_position)
    n_rows = max(array.shape[0] for array in arrays if array is not None)
    return Bounds(
        *(a if a is None else _module(a).broadcast_to(a, (n_rows, a.shape[1])).astype(np.int32) for a in arrays)
    )


def _module(array):
    return np if isinstance(array, np.ndarray) else jnp


def query_rows(bounds: Bounds, length: int):
    """[M, 2 or 3, length] int32: start, end (and id) of every query; nothing is visible behind the last."""
    rows = [bounds.start_MT, bounds.end_MT] + ([] if bounds.q_ids_MT is None else [bounds.q_ids_MT])
    return _stack(rows, length, [0] * len(rows))


def key_rows(bounds: Bounds, length: int):
    """[M, n, length] int32: ids and positions of keys as far as given; keys behind the last are hidden. Or None."""
    given = [(bounds.k_ids_MS, -1), (bounds.k_position_MS, _HIGH)]
    given = [(array, fill) for array, fill in given if array is not None]
    return _stack([array for array, _ in given], length, [fill for _, fill in given]) if given else None


def _stack(arrays, length: int, fills):
    xp = np if all(isinstance(array, np.ndarray) for array in arrays) else jnp
    padded = [
        xp.pad(array, ((0, 0), (0, length - array.shape[1])), constant_values=fill)
        for array, fill in zip(arrays, fills, strict=True)
    ]
    return xp.stack(padded, axis=1)


def _blocks(array, width: int):
    """[M, n] -> [M, blocks, width], the last value repeated to whole blocks."""
    array = _module(array).pad(array, ((0, 0), (0, -array.shape[1] % width)), mode="edge")
    return array.reshape(array.shape[0], -1, width)


def _limits(array, where=None):
    """(lowest, highest) of every block, of those `where` says."""
    xp = _module(array)
    if where is None:
        return array.min(2), array.max(2)
    return xp.where(where, array, _HIGH).min(2), xp.where(where, array, _LOW).max(2)


def block_pairs(bounds: Bounds, n_keys: int, block_q: int, block_k: int):
    """(anything visible, everything visible), bool [M, Q, J]; never too little of the former or too much of the latter.

    "Everything" takes no notice of queries behind the last, whose results go nowhere.
    """

    start, end = _blocks(bounds.start_MT, block_q), _blocks(bounds.end_MT, block_q)
    position = np.arange(n_keys, dtype=np.int32)[None] if bounds.k_position_MS is None else bounds.k_position_MS
    low, top = (limit[:, None] for limit in _limits(_blocks(position, block_k)))
    seeing = start < end
    some = (_limits(start, seeing)[0][:, :, None] <= top) & (_limits(end, seeing)[1][:, :, None] > low)
    whole = (_limits(start)[1][:, :, None] <= low) & (_limits(end)[0][:, :, None] > top)
    whole = whole & (np.arange(1, low.shape[2] + 1) * block_k <= n_keys)[None, None]
    if bounds.q_ids_MT is not None:
        q_ids, k_ids = _blocks(bounds.q_ids_MT, block_q), _blocks(bounds.k_ids_MS, block_k)
        (q_low, q_top), (k_low, k_top) = _limits(q_ids, q_ids != 0), _limits(k_ids, k_ids != -1)
        some = some & (q_low[:, :, None] <= k_top[:, None]) & (k_low[:, None] <= q_top[:, :, None])
        (q_low, q_top), (k_low, k_top) = _limits(q_ids), _limits(k_ids)
        same = (q_low[:, :, None] == k_low[:, None]) & (q_top[:, :, None] == k_top[:, None])
        whole = whole & same & (q_low == q_top)[:, :, None]
    return some, whole


def key_ranges(bounds: Bounds, n_keys: int, block_q: int, block_k: int):
    """[M, Q, 4] int32: key blocks lo..hi to visit for each query block, at least one, a..b of them without masks."""
    if bounds.q_ids_MT is None and bounds.k_position_MS is None:
        lo, a, b, hi = _ranges_of_bounds(bounds, block_q, block_k)
    else:
        lo, a, b, hi = _ranges(*block_pairs(bounds, n_keys, block_q, block_k), 2)
    xp = _module(lo)
    empty = hi == 0
    a, b = (xp.where(a == b, lo, limit) for limit in (a, b))
    return xp.stack([lo, a, b, xp.where(empty, 1, hi)], axis=2).astype(np.int32)


def query_ranges(bounds: Bounds, n_keys: int, block_q: int, block_k: int):
    """[M, J, 4] int32: query blocks lo..hi to visit for each key block, perhaps none, a..b of them without masks."""
    lo, a, b, hi = _ranges(*block_pairs(bounds, n_keys, block_q, block_k), 1)
    xp = _module(lo)
    a, b = (xp.where(a == b, hi, limit) for limit in (a, b))
    return xp.stack([lo, a, b, hi], axis=2).astype(np.int32)


def _ranges_of_bounds(bounds: Bounds, block_q: int, block_k: int):
    """`_ranges` of `block_pairs` over keys where bounds say all, in few operations."""
    start, end = _blocks(bounds.start_MT, block_q), _blocks(bounds.end_MT, block_q)
    xp = _module(start)
    first, last = _limits(start, start < end)[0], _limits(end, start < end)[1]
    empty = first >= last
    lo, hi = xp.where(empty, 0, first // block_k), xp.where(empty, 0, -(-last // block_k))
    a, b = -(-_limits(start)[1] // block_k), _limits(end)[0] // block_k
    none = empty | (a >= b)
    return lo, xp.where(none, lo, a), xp.where(none, lo, b), hi


def _ranges(some, whole, axis: int):
    """First and one behind the last of `some`; the first run of `whole` between (a == b: none)."""
    xp = _module(some)
    n = some.shape[axis]
    lo = some.argmax(axis)
    hi = xp.where(some.any(axis), n - xp.flip(some, axis).argmax(axis), 0)
    whole = whole & some
    a = whole.argmax(axis)
    number = np.expand_dims(np.arange(n), (0, 3 - axis))
    run = whole | (number <= xp.expand_dims(a, axis))
    b = xp.where(run.all(axis), n, run.argmin(axis))
    return lo, a, xp.where(whole.any(axis), b, a), hi
