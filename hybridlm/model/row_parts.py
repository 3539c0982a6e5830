# SPDX-License-Identifier: Apache-2.0
"""Sublayers run on shares of the rows, side by side: what one share exchanges between devices can pass behind the
products of another, as neither reads the other (Domino, arXiv:2409.15241)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from hybridlm import sharding
from hybridlm.layers.block import Block, Output, Tokens, shares, walk


def side_by_side(call: Callable, block: Block, n: int) -> Callable:
    """`call(state, shared, x_BTD, tokens)` of a sublayer of the block, run on n shares of the rows and put together.

    Every device splits the rows that it has. Where they do not divide by n, and with blocks that report of the batch as
    a whole, hand something on or share weights, it is `call` as it is: their results would be others, or are pairs.
    """
    apart = any(inside.STATISTICS for _, inside in walk(block)) or shares(block)
    if n == 1 or apart:
        return call

    def run(state, shared_state, x: Any, tokens: Tokens) -> Output:
        if isinstance(x, tuple) or tokens.inspect or not _divides(x, n):
            return call(state, shared_state, x, tokens)
        ids, positions = tokens.segment_ids, tokens.positions
        ys = []
        for i in range(n):
            of_share = replace(
                tokens, segment_ids=_share(ids, n, i), positions=_share(positions, n, i), embedded_BTD=None
            )
            ys.append(call(state, shared_state, _share(x, n, i), of_share)[0])
        return Output(jnp.stack(ys, axis=1).reshape(x.shape), {})

    return run


def _divides(x_BTD: jax.Array, n: int) -> bool:
    n_devices = 1
    for axis in sharding.split_axes("batch", x_BTD.shape[0]):
        n_devices *= sharding.axis_size(axis)
    return x_BTD.shape[0] % (n * n_devices) == 0


def _share(a: jax.Array | None, n: int, i: int) -> jax.Array | None:
    """Every n-th row, from the i-th on: so rows stay on the devices that have them."""
    return None if a is None else a.reshape(a.shape[0] // n, n, *a.shape[1:])[:, i]
