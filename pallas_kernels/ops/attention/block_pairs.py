# SPDX-License-Identifier: Apache-2.0
"""Which blocks of keys a block of queries has to visit: the lists that the TPU kernels walk.

A pair of a query and a key block is described by one int32 word. What is visible is found from the smallest and
largest document id and position of tiles of half a block, so that documents, windows and the causal mask skip whole
blocks, and tiles within the blocks that they cut. Any ids and positions are described rightly; those in order well.
"""

import typing

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ops.attention.mask import Mask

FIRST, LAST, WHOLE = 1, 2, 4  # flags: first and last pair of its group; every query sees every key
TILE_SHIFT, QUERY_SHIFT, KEY_SHIFT = 3, 7, 19  # one bit for each of 2 x 2 tiles; block numbers of 12 bits
MOST_BLOCKS = 1 << 12
TILES = 2  # tiles along each side of a block
_HIGH = np.iinfo(np.int32).max


class Pairs(typing.NamedTuple):
    """Words [B or 1, n] of the pairs to visit, and their number: the most of any row, behind which words do nothing."""

    words_BN: jax.Array | np.ndarray
    count: jax.Array | int  # type: ignore[assignment]  # a tuple's method has the name


def query_block(word):
    return (word >> QUERY_SHIFT) & (MOST_BLOCKS - 1)


def key_block(word):
    return (word >> KEY_SHIFT) & (MOST_BLOCKS - 1)


def tile_bit(row: int, column: int) -> int:
    """Bit of a word for the tile of these halves of queries and keys."""
    return 1 << (TILE_SHIFT + TILES * row + column)


def by_query(mask: Mask, blocks: tuple[int, int]) -> Pairs:
    """Pairs in order of query blocks, each of which is visited at least once; groups are query blocks."""
    some, whole = _tiles(mask, blocks)
    return _compact(some, whole, 1, False)


def by_key(mask: Mask, blocks: tuple[int, int], parts: int) -> Pairs:
    """Pairs in order of (part of the queries, key block), each visited at least once; groups are those."""
    some, whole = _tiles(mask, blocks)
    return _compact(some, whole, parts, True)


def _tiles(mask: Mask, blocks):
    """(anything visible, everything visible) by tile, bool [B or 1, query tiles, key tiles].

    The mask's ids and positions, as far as it has them, fill whole blocks.
    """

    def limits(array, width, where=None):
        """Smallest and largest entry of each tile."""
        xp = np if isinstance(array, np.ndarray) else jnp
        cut = array.reshape(array.shape[0], -1, width)
        if where is None:
            return cut.min(2), cut.max(2)
        return xp.where(cut != where, cut, _HIGH).min(2), xp.where(cut != where, cut, -_HIGH).max(2)

    q_width, k_width = (block // TILES for block in blocks)
    some = whole = np.True_
    if mask.q_ids_BT is not None:
        (q_low, q_top), (k_low, k_top) = limits(mask.q_ids_BT, q_width, 0), limits(mask.k_ids_BS, k_width, 0)
        some = (q_low[:, :, None] <= k_top[:, None]) & (k_low[:, None] <= q_top[:, :, None])
        (q_low, q_top), (k_low, k_top) = limits(mask.q_ids_BT, q_width), limits(mask.k_ids_BS, k_width)
        whole = ((q_low == q_top) & (q_low != 0))[:, :, None] & (q_low[:, :, None] == k_low[:, None])
        whole = whole & (k_low == k_top)[:, None]
    if mask.q_position_BT is not None:
        (q_low, q_top), (k_low, k_top) = limits(mask.q_position_BT, q_width), limits(mask.k_position_BS, k_width)
        if mask.causal:
            some = some & (q_top[:, :, None] >= k_low[:, None])
            whole = whole & (q_low[:, :, None] >= k_top[:, None])
        if mask.window is not None:
            some = some & (q_low[:, :, None] - k_top[:, None] < mask.window)
            whole = whole & (q_top[:, :, None] - k_low[:, None] < mask.window)
    return some, whole


def _compact(some, whole, parts: int, by_keys: bool) -> Pairs:
    """The words of blocks with anything visible, closed up, in order."""
    xp = np if isinstance(some, np.ndarray) else jnp
    n_batch, q_tiles, k_tiles = some.shape
    n_queries, n_keys = q_tiles // TILES, k_tiles // TILES

    def blocks(tiles):
        return tiles.reshape(n_batch, n_queries, TILES, n_keys, TILES)

    word = xp.zeros((n_batch, n_queries, n_keys), np.int32)
    for row in range(TILES):
        for column in range(TILES):
            word = word + blocks(some)[:, :, row, :, column] * np.int32(tile_bit(row, column))
    word = xp.where(blocks(whole).all((2, 4)), np.int32(WHOLE), word)
    visited = word != 0
    word = word + xp.expand_dims(np.arange(n_queries, dtype=np.int32)[:, None] << QUERY_SHIFT, 0)
    word = word + xp.expand_dims(np.arange(n_keys, dtype=np.int32) << KEY_SHIFT, (0, 1))
    group = np.broadcast_to(np.arange(n_queries)[:, None], (n_queries, n_keys))
    if by_keys:
        part = np.arange(n_queries)[:, None] // (n_queries // parts)
        group = part * n_keys + np.arange(n_keys)
    order = np.argsort(group, axis=None, kind="stable")
    group = group.reshape(-1)[order]
    word, visited = (array.reshape(n_batch, -1)[:, order] for array in (word, visited))
    begins = np.diff(group, prepend=-1) != 0
    empty = ~xp.repeat(visited.reshape(n_batch, -1, len(group) // begins.sum()).any(2), len(group) // begins.sum(), 1)
    visited = visited | (xp.expand_dims(begins, 0) & empty)

    last = xp.argsort(~visited, axis=1, stable=True)
    count_B = visited.sum(1)
    filled = xp.expand_dims(np.arange(len(group)), 0) < count_B[:, None]
    word = xp.take_along_axis(word, last, 1)
    group = xp.where(filled, xp.asarray(group)[last], -1)
    edge = xp.full((n_batch, 1), -1, group.dtype)
    first = filled & (group != xp.concatenate([edge, group[:, :-1]], 1))
    final = filled & (group != xp.concatenate([group[:, 1:], edge], 1))
    ending = xp.take_along_axis(word, xp.maximum(count_B[:, None] - 1, 0), 1)
    idle = ending & ~np.int32((1 << QUERY_SHIFT) - 1)
    word = xp.where(filled, word + first * np.int32(FIRST) + final * np.int32(LAST), idle).astype(np.int32)
    if xp is np:
        return Pairs(word[:, : count_B.max()], int(count_B.max()))
    return Pairs(word, count_B.max().astype(jnp.int32))
