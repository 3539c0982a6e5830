# SPDX-License-Identifier: Apache-2.0
"""`relative_attention` by blocks of queries, each recomputed in the backward pass: nothing of [T, S] is in memory.

The term of a block of Q queries is a band of E + Q - 1 keys that moves one key to the right with each query: its rows,
padded by Q and read with one number less a row, stand where they belong, and no index is looked up. Where positions are
given, and a distance is not one of indices, it is gathered.

Axis letters beyond hybridlm's: Q queries of a block, J keys that a block meets, R profiles (in scores: queries of a key
head), E distances.
"""

import jax
import jax.numpy as jnp

LOWEST = -1e30  # the scores of keys that are not seen; finite, so that differences with it are numbers
BLOCK = 128


def relative_attention_xla(
    q_BTHP, k_BSKP, v_BSKP, r_BTHR, profiles_RE, *, window=None, segment_ids=None, positions=None, scale
):
    """See `pallas_kernels.relative_attention`; segment_ids and positions are pairs here."""
    n_queries, n_keys = q_BTHP.shape[1], k_BSKP.shape[1]
    block = min(n_queries, BLOCK)
    n_blocks = -(-n_queries // block)
    counted = positions is None
    near = counted and window is not None and window - 1 + block < n_keys
    before = window - 1 if near else 0  # keys in front of a block's first query; else all keys are there

    padded = lambda array, left, right: jnp.pad(array, [(0, 0), (left, right), *[(0, 0)] * (array.ndim - 2)])
    behind = max(n_blocks * block - n_keys, 0) if near else 0
    of_keys = {"k": k_BSKP, "v": v_BSKP}
    of_queries = {"q": q_BTHP, "r": r_BTHR}
    if segment_ids is not None:
        of_queries["q_ids"], of_keys["k_ids"] = segment_ids
    if not counted:
        of_queries["q_at"], of_keys["k_at"] = positions
    of_keys = {name: padded(array, before, behind) for name, array in of_keys.items()}
    blocks = {
        name: jnp.moveaxis(
            padded(array, 0, n_blocks * block - n_queries).reshape(array.shape[0], n_blocks, block, *array.shape[2:]),
            1, 0,
        )
        for name, array in of_queries.items()
    }  # fmt: skip

    def attend(start, own):
        keys = of_keys
        if near:
            keys = {name: jax.lax.dynamic_slice_in_dim(a, start, before + block, axis=1) for name, a in of_keys.items()}
        if counted:
            first = start - before if near else jnp.zeros((), jnp.int32)
            own = own | {"q_at": (start + jnp.arange(block, dtype=jnp.int32))[None]}
            keys = keys | {"k_at": (first + jnp.arange(keys["k"].shape[1], dtype=jnp.int32))[None]}
        by_distance_BHQE = _by_distance(own, profiles_RE)
        if counted:
            bias_BHQJ = _banded(by_distance_BHQE, start, before, keys["k"].shape[1], n_blocks * block, near)
        else:
            bias_BHQJ = _gathered(by_distance_BHQE, own["q_at"][:, :, None] - keys["k_at"][:, None])
        return _attended(own, keys, bias_BHQJ, window, n_keys, scale)

    starts = block * jnp.arange(n_blocks, dtype=jnp.int32)
    out = jax.lax.map(jax.checkpoint(lambda given: attend(*given)), (starts, blocks))
    return jnp.moveaxis(out, 0, 1).reshape(q_BTHP.shape[0], n_blocks * block, *out.shape[3:])[:, :n_queries]


def _by_distance(own: dict, profiles_RE):
    """[B, H, Q, E]: the term at each distance."""
    dtype = jnp.promote_types(own["q"].dtype, jnp.float32)
    return jnp.einsum("bqhr,re->bhqe", own["r"].astype(dtype), profiles_RE.astype(dtype), preferred_element_type=dtype)


def _banded(by_distance_BHQE, start, before: int, n_keys: int, n_queries: int, near: bool):
    """[B, H, Q, J], the keys being counted: near, from `before` keys in front of the block's first query on; else all
    of them."""
    *rows, size, extent = by_distance_BHQE.shape
    if near and extent > before + 1:
        by_distance_BHQE, extent = by_distance_BHQE[..., : before + 1], before + 1
    wide = jnp.pad(by_distance_BHQE[..., ::-1], [(0, 0)] * (len(rows) + 1) + [(0, size)])
    flat = wide.reshape(*rows, size * (extent + size))
    band_BHQJ = flat[..., : size * (extent + size - 1)].reshape(*rows, size, extent + size - 1)
    if near:  # the band ends at the block's last query, as the keys do
        return jnp.pad(band_BHQJ, [(0, 0)] * (len(rows) + 1) + [(before + 1 - extent, 0)])
    # the band begins extent - 1 keys in front of the block's first query, among nothing on both sides
    room = max(n_keys, n_queries)
    placed = jnp.pad(band_BHQJ, [(0, 0)] * (len(rows) + 1) + [(room, room)])
    return jax.lax.dynamic_slice_in_dim(placed, room + extent - 1 - start, n_keys, axis=-1)


def _gathered(by_distance_BHQE, distance_BQJ):
    """[B, H, Q, J] by distances."""
    extent = by_distance_BHQE.shape[-1]
    shape = (*by_distance_BHQE.shape[:3], distance_BQJ.shape[-1])
    index_BHQJ = jnp.broadcast_to(jnp.clip(distance_BQJ, 0, extent - 1)[:, None], shape)
    near_BQJ = (distance_BQJ >= 0) & (distance_BQJ < extent)
    return jnp.where(near_BQJ[:, None], jnp.take_along_axis(by_distance_BHQE, index_BHQJ, axis=-1), 0)


def _attended(own: dict, keys: dict, bias_BHQJ, window: int | None, n_keys: int, scale: float):
    """[B, Q, H, P] of a block of queries."""
    q_BQHP, k_BJKP, v_BJKP = own["q"], keys["k"], keys["v"]
    (n_batch, size, n_heads, width), n_kv_heads = q_BQHP.shape, k_BJKP.shape[2]
    dtype = bias_BHQJ.dtype
    distance_BQJ = own["q_at"][:, :, None] - keys["k_at"][:, None]
    visible = distance_BQJ >= 0
    visible = visible if window is None else visible & (distance_BQJ < window)
    if "q_ids" in own:
        visible &= (own["q_ids"][:, :, None] == keys["k_ids"][:, None]) & (own["q_ids"] != 0)[:, :, None]
    elif k_BJKP.shape[1] != n_keys:  # some of the block's keys stand outside of the row
        visible &= ((keys["k_at"] >= 0) & (keys["k_at"] < n_keys))[:, None]
    visible_BKRQJ = visible[:, None, None]
    q_BQKRP = q_BQHP.reshape(n_batch, size, n_kv_heads, n_heads // n_kv_heads, width)
    scores = scale * jnp.einsum("bqkrp,bjkp->bkrqj", q_BQKRP, k_BJKP, preferred_element_type=dtype)
    scores = jnp.where(visible_BKRQJ, scores + bias_BHQJ.reshape(scores.shape), LOWEST)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(visible_BKRQJ, jnp.exp(scores - top), 0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1)).astype(v_BJKP.dtype)
    out = jnp.einsum("bkrqj,bjkp->bqkrp", weights, v_BJKP, preferred_element_type=dtype)
    return out.reshape(n_batch, size, n_heads, v_BJKP.shape[-1]).astype(q_BQHP.dtype)
