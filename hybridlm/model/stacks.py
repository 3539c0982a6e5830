# SPDX-License-Identifier: Apache-2.0
"""Parameters as they are stored, stacked over the repeats of groups, and as the program reads them, over its spots.

Stored: `trees[g][position]`, arrays [repeats, ...] (`pattern.groups`). Stacked: `trees[number]` of each spot, arrays
[depths, ...] (`pattern.spots`). Both hold the numbers of every depth once.
"""

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from hybridlm.model.pattern import groups, places, spots
from pallas_kernels import platform

Row = tuple[Any, int]
"""Which stack, and its index there."""
LARGE = 2**16
"""Numbers of an array whose kernel is worth being one of its own."""


def stack(pattern: str, unroll: int, stored) -> list:
    """The trees of spots from those of groups."""
    return [_take(rows, lambda key: stored[key[0]][key[1]]) for rows in _sources(pattern, unroll)]


def spread(pattern: str, unroll: int, stacked) -> list[list]:
    """The trees of groups from those of spots: the inverse of `stack`."""
    return [[_take(rows, lambda key: stacked[key], _chosen) for rows in group] for group in _targets(pattern, unroll)]


@cache
def _sources(pattern: str, unroll: int) -> list[list[Row]]:
    """Of each spot where its depths are stored."""
    rows = [((place.group, place.position), place.repeat) for place in places(pattern)]
    return [[rows[depth] for depth in spot.depths] for spot in spots(pattern, unroll)]


@cache
def _targets(pattern: str, unroll: int) -> list[list[list[Row]]]:
    """Of each sublayer of each group where its repeats are in the spots' stacks."""
    made: list[list[list[Row]]] = [[[(None, 0)] * group.repeats for _ in group.unit] for group in groups(pattern)]
    for number, of_spot in enumerate(_sources(pattern, unroll)):
        for index, ((group, position), repeat) in enumerate(of_spot):
            made[group][position][repeat] = (number, index)
    return made


def _chosen(a, b):
    """Two arrays [1, ...] one after the other. What reads them chooses for each number: nothing is copied, as it would
    be by a slow program of its own on a GPU.

    Large ones are added up there, each with zeros where the other is (by which zeros lose their sign): XLA puts what
    chooses by one mask into one program. Of five projections of hybrid_125m's that was 4 s of a start, for one kernel
    that kept 2.4 kB a thread in memory.
    """
    if a.size < LARGE or platform.platform() != "gpu":
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, (2, *a.shape[1:]), 0) == 0, a, b)
    zero, others = jnp.zeros((), a.dtype), [(0, 0, 0)] * (a.ndim - 1)
    return jax.lax.pad(a, zero, [(0, 1, 0), *others]) + jax.lax.pad(b, zero, [(1, 0, 0), *others])


def _take(rows: Sequence[Row], tree_of, both=None) -> object:
    """The tree whose arrays are these rows, one after the other. both: how two arrays of one row each are joined."""
    keys = list(dict.fromkeys(key for key, _ in rows))
    rounds = len(rows) // len(keys)
    if len(keys) > 1 and list(rows) == [(key, i) for i in range(rounds) for key in keys]:  # in turn: no slices
        trees = [tree_of(key) for key in keys]
        if both is not None and len(rows) == len(trees) == 2:
            return jax.tree.map(both, *trees)
        return jax.tree.map(lambda *a: jnp.stack([x[:rounds] for x in a], 1).reshape(-1, *a[0].shape[1:]), *trees)
    pieces = _progressions(rows)
    trees = [tree_of(key) for key, _ in pieces]
    return jax.tree.map(lambda *a: _concatenated([_cut(x, r) for x, (_, r) in zip(a, pieces, strict=True)]), *trees)


def _progressions(rows: Sequence[Row]) -> list[tuple[Hashable, range]]:
    """The rows as few slices."""
    made: list[tuple[Hashable, range]] = []
    for key, i in rows:
        last, indices = made[-1] if made else (None, range(0))
        step = i - indices[-1] if last == key and len(indices) else 0
        if step > 0 and (len(indices) == 1 or step == indices.step):
            made[-1] = key, range(indices.start, i + 1, step)
        else:
            made.append((key, range(i, i + 1)))
    return made


def _cut(array: jax.Array, rows: range) -> jax.Array:
    return array if rows == range(array.shape[0]) else array[rows.start : rows.stop : rows.step]


def _concatenated(arrays: list[jax.Array]) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)
