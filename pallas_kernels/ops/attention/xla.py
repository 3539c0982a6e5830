# SPDX-License-Identifier: Apache-2.0
"""`attention` as blockwise online softmax (Dao et al. 2022, arXiv:2205.14135): memory linear in T and S.

One loop walks a static list of block pairs (query block, key block), without those that the causal and window masks
over token indices hide; pairs that documents or given positions hide are skipped at run time. The backward pass walks
the same list and recomputes the weights from the stored log-sum. On a GPU, calls that cuDNN serves go to it.

Axis letters beyond hybridlm's: R query heads of a key head, Q and J positions in a query and a key block, V width of v.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import platform
from pallas_kernels.ops.attention import int8
from pallas_kernels.ops.attention.mask import LOWEST, Mask, key_positions, make_mask, query_positions, visible_pairs

_BLOCK = 512


class _Settings(typing.NamedTuple):
    scale: float
    softcap: float | None
    n_keys: int  # before padding
    blocks: tuple[int, int]


def attention_xla(
    q_BTHP,
    k_BSKP,
    v_BSKP,
    *,
    gate=None,
    causal=True,
    window=None,
    segment_ids=None,
    positions=None,
    scale=None,
    softcap=None,
    sinks=None,
    q_offset=0,
    k_scale=None,
    v_scale=None,
    stacked=None,
):
    """See `pallas_kernels.attention`; segment_ids and positions are pairs here.

    stacked: (k, v, layer), where k and v are the entries `layer` of [L, B, S, K, P]: those of int8 are read there.
    """
    scale = q_BTHP.shape[-1] ** -0.5 if scale is None else scale
    if k_scale is not None:
        mask = make_mask(causal, window, segment_ids, positions, q_offset)
        settings = int8.Settings(scale, softcap, sinks)
        out_BTHP = int8.attend(q_BTHP, (k_BSKP, v_BSKP), (k_scale, v_scale), mask, settings, stacked)
        return out_BTHP if gate is None else apply_gate(out_BTHP, gate)
    plain = segment_ids is None and positions is None and softcap is None and sinks is None
    if plain and isinstance(q_offset, int) and q_offset == 0 and cudnn_serves(q_BTHP, k_BSKP, v_BSKP, causal, window):
        local = None if window is None else (window - 1, 0)
        out_BTHP = jax.nn.dot_product_attention(
            q_BTHP, k_BSKP, v_BSKP, scale=scale, is_causal=causal, local_window_size=local, implementation="cudnn"
        )
    else:
        mask = make_mask(causal, window, segment_ids, positions, q_offset)
        out_BTHP = _blockwise(q_BTHP, k_BSKP, v_BSKP, mask, scale, softcap, sinks)
    return out_BTHP if gate is None else apply_gate(out_BTHP, gate)


def cudnn_serves(q_BTHP, k_BSKP, v_BSKP, causal: bool, window: int | None) -> bool:
    """Whether cuDNN has what these arrays and masks by index ask for, on a GPU."""
    same = q_BTHP.dtype == k_BSKP.dtype == v_BSKP.dtype and q_BTHP.dtype in (jnp.bfloat16, jnp.float16)
    width = q_BTHP.shape[-1]
    fits = v_BSKP.shape[-1] == width and width % 8 == 0 and width <= 128 and q_BTHP.shape[1] == k_BSKP.shape[1]
    return same and fits and q_BTHP.shape[1] > 1 and (causal or window is None) and platform.platform() == "gpu"


def apply_gate(out_BTHP, gate):
    """sigmoid(gate) * out, gate [B, T, H, P] or [B, T, H]; the backward recomputes the sigmoid."""
    return _apply_gate(out_BTHP, gate if gate.ndim == 4 else gate[..., None])


@jax.custom_vjp
def _apply_gate(out_BTHP, gate):
    return _apply_gate_forward(out_BTHP, gate)[0]


def _apply_gate_forward(out_BTHP, gate):
    dtype = jnp.promote_types(out_BTHP.dtype, jnp.float32)
    gated_BTHP = out_BTHP.astype(dtype) * jax.nn.sigmoid(gate.astype(dtype))
    return gated_BTHP.astype(out_BTHP.dtype), (out_BTHP, gate)


def _apply_gate_backward(residuals, dgated_BTHP):
    out_BTHP, gate = residuals
    dtype = jnp.promote_types(out_BTHP.dtype, jnp.float32)
    open_ = jax.nn.sigmoid(gate.astype(dtype))
    dgated_BTHP = dgated_BTHP.astype(dtype)
    dgate = dgated_BTHP * out_BTHP.astype(dtype) * open_ * (1 - open_)
    if gate.shape[-1] != dgate.shape[-1]:
        dgate = dgate.sum(axis=-1, keepdims=True)
    return (dgated_BTHP * open_).astype(out_BTHP.dtype), dgate.astype(gate.dtype)


_apply_gate.defvjp(_apply_gate_forward, _apply_gate_backward)


def _blockwise(q_BTHP, k_BSKP, v_BSKP, mask: Mask, scale, softcap, sinks):
    n_batch, n_queries, n_heads, _ = q_BTHP.shape
    n_keys, n_kv_heads = k_BSKP.shape[1:3]
    blocks = _block_sizes(n_queries, n_keys)
    q_BKRTP = jnp.moveaxis(q_BTHP.reshape(n_batch, n_queries, n_kv_heads, n_heads // n_kv_heads, -1), 1, 3)
    q_BKRTP = _pad(q_BKRTP, 3, blocks[0])
    k_BKSP, v_BKSV = (_pad(jnp.moveaxis(a, 1, 2), 2, blocks[1]) for a in (k_BSKP, v_BSKP))
    mask = _by_side(_located(mask, n_queries, n_keys), lambda array, side: _pad(array, 1, blocks[side]))
    sinks_KR = None if sinks is None else sinks.reshape(n_kv_heads, -1)
    out_BKRTV = _attend(q_BKRTP, k_BKSP, v_BKSV, sinks_KR, mask, _Settings(scale, softcap, n_keys, blocks))
    return jnp.moveaxis(out_BKRTV[:, :, :, :n_queries], 3, 1).reshape(n_batch, n_queries, n_heads, -1)


def _located(mask: Mask, n_queries: int, n_keys: int) -> Mask:
    """The mask with positions as arrays where it orders by others than indices, else without."""
    if not mask.ordered:
        return mask.replace(q_offset=0, q_position_BT=None, k_position_BS=None, offset_B=None)
    if mask.q_offset is not None:
        return mask
    q_position_BT, k_position_BS = query_positions(mask, n_queries), jnp.asarray(key_positions(mask, n_keys))
    return mask.replace(q_position_BT=q_position_BT, k_position_BS=k_position_BS, offset_B=None)


def _by_side(mask: Mask, change) -> Mask:
    """The mask with change(array, 0 of queries or 1 of keys) for its arrays."""
    sides = {"q_ids_BT": 0, "k_ids_BS": 1, "q_position_BT": 0, "k_position_BS": 1}
    arrays = {name: getattr(mask, name) for name in sides}
    return mask.replace(**{name: change(a, sides[name]) for name, a in arrays.items() if a is not None})


def _block_sizes(n_queries: int, n_keys: int) -> tuple[int, int]:
    """Blocks of about 512 x 512 scores a head; few queries (decoding) take longer key blocks."""

    def even(n_tokens, limit):
        count = -(-n_tokens // limit)
        return n_tokens if count == 1 else -(-n_tokens // (8 * count)) * 8

    q_block = even(n_queries, _BLOCK)
    return q_block, even(n_keys, max(_BLOCK, _BLOCK * _BLOCK // q_block))


def _pad(array, axis: int, multiple: int):
    missing = -array.shape[axis] % multiple
    return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)]) if missing else array


def _pairs(n_query_blocks: int, n_key_blocks: int, mask: Mask, settings: _Settings) -> np.ndarray:
    """[n, 2] int32: the block pairs in which the masks over indices leave anything visible, by query block."""
    q_block, k_block = settings.blocks
    first_key = np.arange(n_key_blocks)[None, :] * k_block
    visible = np.broadcast_to(first_key < settings.n_keys, (n_query_blocks, n_key_blocks))
    if mask.q_offset is not None:
        first_query = np.arange(n_query_blocks)[:, None] * q_block + mask.q_offset
        if mask.causal:
            visible = visible & (first_query + q_block - 1 >= first_key)
        if mask.window is not None:
            visible = visible & (first_query - (first_key + k_block - 1) < mask.window)
    return np.argwhere(visible).astype(np.int32)


def _at(array, index, width: int, axis: int):
    return jax.lax.dynamic_slice_in_dim(array, index * width, width, axis=axis)


def _put(array, block, index, width: int, axis: int):
    return jax.lax.dynamic_update_slice_in_dim(array, block, index * width, axis=axis)


def _block_mask(mask: Mask, pair, settings: _Settings) -> Mask:
    return _by_side(mask, lambda array, side: _at(array, pair[side], settings.blocks[side], 1))


def _visible(mask: Mask, pair, settings: _Settings):
    """[B or 1, Q, J] bool of a pair of blocks, whose mask this is, or None where everything is visible."""
    q_block, k_block = settings.blocks
    q_ids, k_ids, q_position, k_position = mask.q_ids_BT, mask.k_ids_BS, mask.q_position_BT, mask.k_position_BS
    key_1J = pair[1] * k_block + jnp.arange(k_block)[None, :]
    if mask.q_offset is not None:
        q_position, k_position = (mask.q_offset + pair[0] * q_block + jnp.arange(q_block))[None, :], key_1J
    q_id, k_id = (None, None) if q_ids is None else (q_ids[:, :, None], k_ids[:, None, :])
    visible = visible_pairs(q_id, k_id, q_position[:, :, None], k_position[:, None, :], mask.causal, mask.window)
    if not settings.n_keys % k_block:
        return visible
    inside = (key_1J < settings.n_keys)[:, None, :]
    return inside if visible is None else visible & inside


def _hidden(mask: Mask):
    """Scalar bool: documents or positions surely hide the whole block whose mask this is; None: they say nothing."""
    conditions = []
    if mask.has_ids:
        high = jnp.iinfo(jnp.int32).max
        sides = (mask.q_ids_BT, mask.k_ids_BS)
        q_low_B, k_low_B = (jnp.min(jnp.where(ids == 0, high, ids), axis=1) for ids in sides)
        q_top_B, k_top_B = (jnp.max(jnp.where(ids == 0, -high, ids), axis=1) for ids in sides)
        conditions.append((q_top_B < k_low_B) | (k_top_B < q_low_B))
    if mask.has_positions:
        q_BT, k_BS = mask.q_position_BT, mask.k_position_BS
        if mask.causal:
            conditions.append(q_BT.max(axis=1) < k_BS.min(axis=1))
        if mask.window is not None:
            conditions.append(q_BT.min(axis=1) - k_BS.max(axis=1) >= mask.window)
    return jnp.all(functools.reduce(jnp.logical_or, conditions)) if conditions else None


def _walk(pairs: np.ndarray, visit, mask: Mask, carry, read, write, settings: _Settings):
    """Applies visit to every pair: carry <- write(carry, pair, visit(read(carry, pair), pair, its mask))."""

    def step(carry, pair):
        here = _block_mask(mask, pair, settings)
        block = read(carry, pair)
        hidden = _hidden(here) if len(pairs) > 1 else None
        if hidden is None:
            block = visit(block, pair, here)
        else:
            block = jax.lax.cond(hidden, lambda block: block, lambda block: visit(block, pair, here), block)
        return write(carry, pair, block), None

    if len(pairs) == 1:
        return step(carry, pairs[0])[0]
    return jax.lax.scan(step, carry, jnp.asarray(pairs))[0] if len(pairs) else carry


def _scores(q_BKRQP, k_BKJP, settings: _Settings, dtype):
    """(scores, derivative of the softcap or None)."""
    scores_BKRQJ = jnp.einsum("bkrqp,bkjp->bkrqj", q_BKRQP, k_BKJP, preferred_element_type=dtype) * settings.scale
    if settings.softcap is None:
        return scores_BKRQJ, None
    squashed_BKRQJ = jnp.tanh(scores_BKRQJ / settings.softcap)
    return settings.softcap * squashed_BKRQJ, 1 - squashed_BKRQJ * squashed_BKRQJ


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BKRTP, k_BKSP, v_BKSV, sinks_KR, mask: Mask, settings: _Settings):
    return _attend_forward(q_BKRTP, k_BKSP, v_BKSV, sinks_KR, mask, settings)[0]


def _attend_forward(q_BKRTP, k_BKSP, v_BKSV, sinks_KR, mask: Mask, settings: _Settings):
    dtype = jnp.promote_types(q_BKRTP.dtype, jnp.float32)
    q_block, k_block = settings.blocks

    def read(carry, pair):
        return tuple(_at(array, pair[0], q_block, 3) for array in carry)

    def write(carry, pair, block):
        return tuple(_put(array, part, pair[0], q_block, 3) for array, part in zip(carry, block))

    def visit(block, pair, here):
        sum_BKRQV, top_BKRQ, total_BKRQ = block
        scores_BKRQJ, _ = _scores(_at(q_BKRTP, pair[0], q_block, 3), _at(k_BKSP, pair[1], k_block, 2), settings, dtype)
        visible = _visible(here, pair, settings)
        if visible is not None:
            visible = visible[:, None, None]
            scores_BKRQJ = jnp.where(visible, scores_BKRQJ, LOWEST)
        new_top_BKRQ = jnp.maximum(top_BKRQ, scores_BKRQJ.max(axis=-1))
        weights_BKRQJ = jnp.exp(scores_BKRQJ - new_top_BKRQ[..., None])
        weights_BKRQJ = weights_BKRQJ if visible is None else jnp.where(visible, weights_BKRQJ, 0)
        shrink_BKRQ = jnp.exp(top_BKRQ - new_top_BKRQ)
        v_BKJV = _at(v_BKSV, pair[1], k_block, 2)
        added = jnp.einsum(
            "bkrqj,bkjv->bkrqv", weights_BKRQJ.astype(v_BKJV.dtype), v_BKJV, preferred_element_type=dtype
        )
        return (
            sum_BKRQV * shrink_BKRQ[..., None] + added,
            new_top_BKRQ,
            total_BKRQ * shrink_BKRQ + weights_BKRQJ.sum(axis=-1),
        )

    rows_BKRT = q_BKRTP[..., 0]
    if sinks_KR is None:
        top_BKRT, total_BKRT = jnp.full_like(rows_BKRT, LOWEST, dtype), jnp.zeros_like(rows_BKRT, dtype)
    else:
        top_BKRT = jnp.zeros_like(rows_BKRT, dtype) + sinks_KR.astype(dtype)[None, :, :, None]
        total_BKRT = jnp.ones_like(rows_BKRT, dtype)
    sum_BKRTV = jnp.repeat(jnp.zeros_like(q_BKRTP[..., :1], dtype), v_BKSV.shape[-1], axis=-1)
    carry = (sum_BKRTV, top_BKRT, total_BKRT)
    pairs = _pairs(q_BKRTP.shape[3] // q_block, k_BKSP.shape[2] // k_block, mask, settings)
    sum_BKRTV, top_BKRT, total_BKRT = _walk(pairs, visit, mask, carry, read, write, settings)
    seen_BKRT = total_BKRT > 0
    total_BKRT = jnp.where(seen_BKRT, total_BKRT, 1)
    out_BKRTV = (sum_BKRTV / total_BKRT[..., None]).astype(q_BKRTP.dtype)
    log_sum_BKRT = jnp.where(seen_BKRT, top_BKRT + jnp.log(total_BKRT), 0)
    kept = checkpoint_name((out_BKRTV, log_sum_BKRT), "attention_kept")
    return kept[0], (q_BKRTP, k_BKSP, v_BKSV, sinks_KR, mask, *kept)


def _attend_backward(settings: _Settings, residuals, dout_BKRTV):
    q_BKRTP, k_BKSP, v_BKSV, sinks_KR, mask, out_BKRTV, log_sum_BKRT = residuals
    dtype = log_sum_BKRT.dtype
    q_block, k_block = settings.blocks
    dout_BKRTV = dout_BKRTV.astype(v_BKSV.dtype)
    product_BKRT = jnp.sum(dout_BKRTV.astype(dtype) * out_BKRTV.astype(dtype), axis=-1)

    def read(carry, pair):
        dq, dk, dv = carry
        return _at(dq, pair[0], q_block, 3), _at(dk, pair[1], k_block, 2), _at(dv, pair[1], k_block, 2)

    def write(carry, pair, block):
        (dq, dk, dv), (dq_block, dk_block, dv_block) = carry, block
        return (
            _put(dq, dq_block, pair[0], q_block, 3),
            _put(dk, dk_block, pair[1], k_block, 2),
            _put(dv, dv_block, pair[1], k_block, 2),
        )

    def visit(block, pair, here):
        dq_BKRQP, dk_BKJP, dv_BKJV = block
        q_BKRQP, dout_BKRQV = _at(q_BKRTP, pair[0], q_block, 3), _at(dout_BKRTV, pair[0], q_block, 3)
        k_BKJP, v_BKJV = _at(k_BKSP, pair[1], k_block, 2), _at(v_BKSV, pair[1], k_block, 2)
        scores_BKRQJ, dcap_BKRQJ = _scores(q_BKRQP, k_BKJP, settings, dtype)
        visible = _visible(here, pair, settings)
        if visible is not None:
            visible = visible[:, None, None]
            scores_BKRQJ = jnp.where(visible, scores_BKRQJ, LOWEST)
        weights_BKRQJ = jnp.exp(scores_BKRQJ - _at(log_sum_BKRT, pair[0], q_block, 3)[..., None])
        weights_BKRQJ = weights_BKRQJ if visible is None else jnp.where(visible, weights_BKRQJ, 0)
        dweights_BKRQJ = jnp.einsum("bkrqv,bkjv->bkrqj", dout_BKRQV, v_BKJV, preferred_element_type=dtype)
        dscores_BKRQJ = weights_BKRQJ * (dweights_BKRQJ - _at(product_BKRT, pair[0], q_block, 3)[..., None])
        dscores_BKRQJ = dscores_BKRQJ if dcap_BKRQJ is None else dscores_BKRQJ * dcap_BKRQJ
        dscores_BKRQJ = (dscores_BKRQJ * settings.scale).astype(q_BKRQP.dtype)
        weights_BKRQJ = weights_BKRQJ.astype(dout_BKRQV.dtype)
        return (
            dq_BKRQP + jnp.einsum("bkrqj,bkjp->bkrqp", dscores_BKRQJ, k_BKJP, preferred_element_type=dtype),
            dk_BKJP + jnp.einsum("bkrqj,bkrqp->bkjp", dscores_BKRQJ, q_BKRQP, preferred_element_type=dtype),
            dv_BKJV + jnp.einsum("bkrqj,bkrqv->bkjv", weights_BKRQJ, dout_BKRQV, preferred_element_type=dtype),
        )

    carry = tuple(jnp.zeros_like(array, dtype) for array in (q_BKRTP, k_BKSP, v_BKSV))
    pairs = _pairs(q_BKRTP.shape[3] // q_block, k_BKSP.shape[2] // k_block, mask, settings)
    dq, dk, dv = _walk(pairs, visit, mask, carry, read, write, settings)
    dsinks_KR = None
    if sinks_KR is not None:
        sink_weights_BKRT = jnp.exp(sinks_KR.astype(dtype)[None, :, :, None] - log_sum_BKRT)
        dsinks_KR = -jnp.sum(sink_weights_BKRT * product_BKRT, axis=(0, 3)).astype(sinks_KR.dtype)
    grads = (grad.astype(array.dtype) for grad, array in zip((dq, dk, dv), (q_BKRTP, k_BKSP, v_BKSV)))
    return (*grads, dsinks_KR, None)


_attend.defvjp(_attend_forward, _attend_backward)
