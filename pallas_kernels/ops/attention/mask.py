# SPDX-License-Identifier: Apache-2.0
"""Which keys each query of `attention` sees, as one value; implementations derive from it what their kernels read."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LOWEST = -1e30  # running maximum of a row that has seen no key; finite, so that differences with it are numbers


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("q_ids_BT", "k_ids_BS", "q_position_BT", "k_position_BS", "offset_B"),
    meta_fields=("causal", "window", "q_offset"),
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """A query sees the keys of its id, unless that is 0, not those behind it (causal) or `window` or more before it.

    Arrays are int32, of NumPy where nothing is traced, [B or 1, T] and [B or 1, S]; None where no mask asks for them.
    Without positions keys count from 0 and queries from `q_offset`, or from `offset_B` ([] or [B]) where that is None.
    """

    causal: bool = True
    window: int | None = None
    q_offset: int | None = 0
    q_ids_BT: Any = None
    k_ids_BS: Any = None
    q_position_BT: Any = None
    k_position_BS: Any = None
    offset_B: jax.Array | None = None

    replace = dataclasses.replace

    @property
    def ordered(self) -> bool:
        """Whether positions decide anything."""
        return self.causal or self.window is not None

    @property
    def has_ids(self) -> bool:
        return self.q_ids_BT is not None

    @property
    def has_positions(self) -> bool:
        """Whether positions are given, not counted."""
        return self.k_position_BS is not None


def make_mask(
    causal: bool, window: int | None, segment_ids: tuple[Any, Any] | None, positions: tuple[Any, Any] | None, q_offset
) -> Mask:
    """From the arguments of `pallas_kernels.attention`, of which segment_ids and positions are pairs here."""
    known = isinstance(q_offset, int) and positions is None
    q_ids, k_ids = segment_ids or (None, None)
    q_positions, k_positions = positions or (None, None)
    return Mask(
        causal,
        window,
        q_offset if known else None,
        q_ids,
        k_ids,
        q_positions,
        k_positions,
        offset_B=None if known or positions is not None else q_offset,
    )


def query_positions(mask: Mask, n_queries: int):
    """[B or 1, T] int32 positions of the queries, given or counted."""
    if mask.q_position_BT is not None:
        return mask.q_position_BT
    if mask.q_offset is not None:
        return np.arange(n_queries, dtype=np.int32)[None] + np.int32(mask.q_offset)
    return jnp.reshape(jnp.asarray(mask.offset_B), (-1, 1)) + jnp.arange(n_queries, dtype=jnp.int32)[None]


def key_positions(mask: Mask, n_keys: int):
    """[B or 1, S] int32 positions of the keys, given or counted."""
    return np.arange(n_keys, dtype=np.int32)[None] if mask.k_position_BS is None else mask.k_position_BS


def visible_pairs(q_id, k_id, q_position, k_position, causal: bool, window: int | None) -> Any:
    """bool of pairs of queries and keys, whose ids (or None) and positions broadcast against each other; None: all."""
    visible = None
    if q_id is not None:
        visible = (q_id == k_id) & (q_id != 0)
    if causal:
        ordered = q_position >= k_position
        visible = ordered if visible is None else visible & ordered
    if window is not None:
        near = q_position - k_position < window
        visible = near if visible is None else visible & near
    return visible
