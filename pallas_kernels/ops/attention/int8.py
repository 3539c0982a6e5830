# SPDX-License-Identifier: Apache-2.0
"""`attention` over keys and values of int8 with a scale for each head and token: what a cache is that is read by the
byte.

Keys come by blocks, from where they lie; a block is converted to the type of the queries (exact: whole numbers up to
127), and the scales multiply scores and weights, of which there is one a key and not one a number. So no more than a
block is ever there in floating point. Softmax and sums are online, in float32 at least. Forward alone.

On a GPU the products of a single query are sums over blocks that lie as the cache does: matrix products want the tokens
of a head side by side, for which XLA would transpose the whole cache, of all layers, before each.

Axis letters beyond hybridlm's: R query heads of a key head, J keys of a block, V width of v.
"""

import typing

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels import platform
from pallas_kernels.ops.attention.mask import LOWEST, Mask, query_positions, visible_pairs

MOST = 2**25
"""Numbers of a block of keys, and of its scores: 64 MiB in bfloat16."""
ROWS_FIRST = Layout((0, 1, 2, 3))
"""Of a block [B, J, K, P]."""
LEAST_KEYS = 512
"""Keys of a block at least, however many rows and heads there are."""


class Settings(typing.NamedTuple):
    """Arguments of `pallas_kernels.attention`."""

    scale: float
    softcap: float | None
    sinks: jax.Array | None


def attend(q_BTHP, sides: tuple, scales: tuple, mask: Mask, settings: Settings, stacked: tuple | None = None):
    """[B, T, H, V] in the type of q. sides: keys and values, int8; scales: theirs, [B, K, S]; stacked: (keys, values,
    layer) of which they are the layer's entries, read there in their place."""
    (n_batch, n_queries, n_heads, _), (_, n_keys, n_kv_heads, _) = q_BTHP.shape, sides[0].shape
    width = max(side.shape[3] for side in sides)
    dtype = jnp.promote_types(q_BTHP.dtype, jnp.float32)
    q_BTKRP = q_BTHP.reshape(n_batch, n_queries, n_kv_heads, n_heads // n_kv_heads, -1)
    block = block_size(n_batch * max(n_kv_heads * width, n_heads * n_queries), n_keys)
    position_BT = jnp.asarray(query_positions(mask, n_queries))
    in_sums = n_queries == 1 and platform.platform() == "gpu"

    def cut(array, start, axis: int):
        return jax.lax.dynamic_slice_in_dim(array, start, block, axis)

    def numbers(side: int, start):
        """[B, J, K, P] of a block, in the type of q."""
        if stacked is None:
            found = cut(sides[side], start, 1)
        else:
            stack, layer = stacked[side], stacked[2]
            found = jax.lax.dynamic_slice(stack, (layer, 0, start, 0, 0), (1, n_batch, block, *stack.shape[3:]))[0]
        return (with_layout_constraint(found, ROWS_FIRST) if in_sums else found).astype(q_BTHP.dtype)

    def by_key(side: int, start):
        """[B, K, 1, 1, J]: scales of a block."""
        return cut(scales[side], start, 2).astype(dtype)[:, :, None, None]

    def visit(i, carry):
        sum_BKRTV, top_BKRT, total_BKRT = carry
        start = jnp.minimum(i * block, n_keys - block)  # the last block begins earlier, its first keys were seen
        scores = _scores(q_BTKRP, numbers(0, start), dtype, in_sums) * (settings.scale * by_key(0, start))
        if settings.softcap is not None:
            scores = settings.softcap * jnp.tanh(scores / settings.softcap)
        visible = _visible(mask, position_BT, start, i * block, block, cut)[:, None, None]
        scores = jnp.where(visible, scores, LOWEST)
        new_top_BKRT = jnp.maximum(top_BKRT, scores.max(axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new_top_BKRT[..., None]), 0)
        shrink_BKRT = jnp.exp(top_BKRT - new_top_BKRT)
        added = _weighed(weights * by_key(1, start), numbers(1, start), in_sums)
        sum_BKRTV = sum_BKRTV * shrink_BKRT[..., None] + added
        return sum_BKRTV, new_top_BKRT, total_BKRT * shrink_BKRT + weights.sum(axis=-1)

    rows_BKRT = jnp.moveaxis(q_BTKRP[..., 0], 1, 3)  # which varies over a mesh as all of them do
    if settings.sinks is None:
        top_BKRT, total_BKRT = jnp.full_like(rows_BKRT, LOWEST, dtype), jnp.zeros_like(rows_BKRT, dtype)
    else:
        sinks_KR1 = settings.sinks.astype(dtype).reshape(n_kv_heads, -1, 1)
        top_BKRT, total_BKRT = jnp.zeros_like(rows_BKRT, dtype) + sinks_KR1[None], jnp.ones_like(rows_BKRT, dtype)
    sum_BKRTV = jnp.repeat(jnp.zeros_like(rows_BKRT, dtype)[..., None], sides[1].shape[3], axis=-1)
    carry = sum_BKRTV, top_BKRT, total_BKRT
    n_blocks = -(-n_keys // block)
    if n_blocks == 1:
        carry = visit(0, carry)
    else:
        carry = jax.lax.fori_loop(0, _blocks_seen(mask, position_BT, n_blocks, block), visit, carry)
    sum_BKRTV, _, total_BKRT = carry
    out_BKRTV = sum_BKRTV / jnp.where(total_BKRT > 0, total_BKRT, 1)[..., None]
    return jnp.moveaxis(out_BKRTV, 3, 1).reshape(n_batch, n_queries, n_heads, -1).astype(q_BTHP.dtype)


def _scores(q_BTKRP, k_BJKP, dtype, in_sums: bool):
    """[B, K, R, T, J]. in_sums: of a single query."""
    if not in_sums:
        return jnp.einsum("btkrp,bjkp->bkrtj", q_BTKRP, k_BJKP, preferred_element_type=dtype)
    products_BJKRP = q_BTKRP.astype(dtype) * k_BJKP.astype(dtype)[:, :, :, None]
    return jnp.moveaxis(products_BJKRP.sum(axis=-1), 1, 3)[:, :, :, None]


def _weighed(weights_BKRTJ, v_BJKV, in_sums: bool):
    """[B, K, R, T, V] in the type of the weights: sums of values. in_sums: of a single query."""
    dtype = weights_BKRTJ.dtype
    if not in_sums:
        weights_BKRTJ = weights_BKRTJ.astype(v_BJKV.dtype)
        return jnp.einsum("bkrtj,bjkv->bkrtv", weights_BKRTJ, v_BJKV, preferred_element_type=dtype)
    weights_BJKR = jnp.moveaxis(weights_BKRTJ[:, :, :, 0], 3, 1)
    products_BJKRV = weights_BJKR[..., None] * v_BJKV.astype(dtype)[:, :, :, None]
    return with_layout_constraint(products_BJKRV, Layout((0, 1, 2, 3, 4))).sum(axis=1)[:, :, :, None]


def block_size(numbers_of_key: int, n_keys: int) -> int:
    """Keys of a block: as many as MOST allows of so many numbers each, a multiple of 128, LEAST_KEYS at least."""
    return min(n_keys, max(LEAST_KEYS, MOST // numbers_of_key // 128 * 128))


def _visible(mask: Mask, position_BT, start, first, block: int, cut: typing.Callable):
    """[B or 1, T, J] bool: keys from `start` that a query sees, none of them before `first`."""
    key_1J = (start + jnp.arange(block, dtype=jnp.int32))[None]
    q_id, k_id = mask.q_ids_BT, mask.k_ids_BS
    if q_id is not None:
        q_id, k_id = q_id[:, :, None], cut(k_id, start, 1)[:, None]
    k_position = key_1J if mask.k_position_BS is None else cut(mask.k_position_BS, start, 1)
    visible = visible_pairs(q_id, k_id, position_BT[:, :, None], k_position[:, None], mask.causal, mask.window)
    new_1TJ = (key_1J >= first)[:, None]
    return jnp.broadcast_to(new_1TJ, (1, position_BT.shape[1], block)) if visible is None else visible & new_1TJ


def _blocks_seen(mask: Mask, position_BT, n_blocks: int, block: int):
    """Blocks up to the last that a query sees, where keys are in order: room behind a cache's tokens is not read."""
    if not mask.causal or mask.k_position_BS is not None:
        return n_blocks
    return jnp.clip(position_BT.max() // block + 1, 0, n_blocks)
