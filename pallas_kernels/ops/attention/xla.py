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

from pallas_kernels import dispatch

_BLOCK = 512
_HIDDEN = -1e30  # running maximum of a row that has seen no key


class _Settings(typing.NamedTuple):
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    q_offset: int | None  # None: positions are in _Places
    n_keys: int  # before padding
    blocks: tuple[int, int]


class _Places(typing.NamedTuple):
    """Where queries and keys stand; None where that follows from indices."""

    q_ids_BT: jax.Array | None = None
    k_ids_BS: jax.Array | None = None
    q_position_BT: jax.Array | None = None
    k_position_BS: jax.Array | None = None


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
):
    """See `pallas_kernels.attention`; segment_ids and positions are pairs here."""
    scale = q_BTHP.shape[-1] ** -0.5 if scale is None else scale
    plain = segment_ids is None and positions is None and softcap is None and sinks is None
    if plain and isinstance(q_offset, int) and q_offset == 0 and cudnn_serves(q_BTHP, k_BSKP, v_BSKP, causal, window):
        local = None if window is None else (window - 1, 0)
        out_BTHP = jax.nn.dot_product_attention(
            q_BTHP, k_BSKP, v_BSKP, scale=scale, is_causal=causal, local_window_size=local, implementation="cudnn"
        )
    else:
        out_BTHP = _blockwise(
            q_BTHP, k_BSKP, v_BSKP, causal, window, segment_ids, positions, scale, softcap, sinks, q_offset
        )
    return out_BTHP if gate is None else apply_gate(out_BTHP, gate)


def cudnn_serves(q_BTHP, k_BSKP, v_BSKP, causal: bool, window: int | None) -> bool:
    """Whether cuDNN has what these arrays and masks by index ask for, on a GPU."""
    same = q_BTHP.dtype == k_BSKP.dtype == v_BSKP.dtype and q_BTHP.dtype in (jnp.bfloat16, jnp.float16)
    width = q_BTHP.shape[-1]
    fits = v_BSKP.shape[-1] == width and width % 8 == 0 and width <= 128 and q_BTHP.shape[1] == k_BSKP.shape[1]
    return same and fits and q_BTHP.shape[1] > 1 and (causal or window is None) and dispatch.platform() == "gpu"


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


def _blockwise(q_BTHP, k_BSKP, v_BSKP, causal, window, segment_ids, positions, scale, softcap, sinks, q_offset):
    n_batch, n_queries, n_heads, _ = q_BTHP.shape
    n_keys, n_kv_heads = k_BSKP.shape[1:3]
    places = _Places(*(segment_ids or (None, None)), *(positions or (None, None)))
    if not isinstance(q_offset, int):
        index_1T = jnp.arange(n_queries, dtype=jnp.int32)[None]
        places = places._replace(
            q_position_BT=jnp.broadcast_to(q_offset, (n_batch,))[:, None] + index_1T,
            k_position_BS=jnp.broadcast_to(jnp.arange(n_keys, dtype=jnp.int32), (n_batch, n_keys)),
        )
    blocks = _block_sizes(n_queries, n_keys)
    given = places.q_position_BT is not None
    settings = _Settings(causal, window, scale, softcap, None if given else q_offset, n_keys, blocks)
    if given and not causal and window is None:
        places = places._replace(q_position_BT=None, k_position_BS=None)
        settings = settings._replace(q_offset=0)

    q_BKRTP = jnp.moveaxis(q_BTHP.reshape(n_batch, n_queries, n_kv_heads, n_heads // n_kv_heads, -1), 1, 3)
    q_BKRTP = _pad(q_BKRTP, 3, blocks[0])
    k_BKSP, v_BKSV = (_pad(jnp.moveaxis(a, 1, 2), 2, blocks[1]) for a in (k_BSKP, v_BSKP))
    padded_places = _Places(*(a if a is None else _pad(a, 1, blocks[i % 2]) for i, a in enumerate(places)))
    sinks_KR = None if sinks is None else sinks.reshape(n_kv_heads, -1)
    out_BKRTV = _attend(q_BKRTP, k_BKSP, v_BKSV, sinks_KR, padded_places, settings)
    return jnp.moveaxis(out_BKRTV[:, :, :, :n_queries], 3, 1).reshape(n_batch, n_queries, n_heads, -1)


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


def _pairs(n_query_blocks: int, n_key_blocks: int, settings: _Settings) -> np.ndarray:
    """[n, 2] int32: the block pairs in which the masks over indices leave anything visible, by query block."""
    q_block, k_block = settings.blocks
    first_key = np.arange(n_key_blocks)[None, :] * k_block
    visible = np.broadcast_to(first_key < settings.n_keys, (n_query_blocks, n_key_blocks))
    if settings.q_offset is not None:
        first_query = np.arange(n_query_blocks)[:, None] * q_block + settings.q_offset
        if settings.causal:
            visible = visible & (first_query + q_block - 1 >= first_key)
        if settings.window is not None:
            visible = visible & (first_query - (first_key + k_block - 1) < settings.window)
    return np.argwhere(visible).astype(np.int32)


def _at(array, index, width: int, axis: int):
    return jax.lax.dynamic_slice_in_dim(array, index * width, width, axis=axis)


def _put(array, block, index, width: int, axis: int):
    return jax.lax.dynamic_update_slice_in_dim(array, block, index * width, axis=axis)


def _block_places(places: _Places, pair, settings: _Settings) -> _Places:
    return _Places(*(a if a is None else _at(a, pair[i % 2], settings.blocks[i % 2], 1) for i, a in enumerate(places)))


def _mask(places: _Places, pair, settings: _Settings):
    """[B or 1, Q, J] bool, or None where everything is visible."""
    q_block, k_block = settings.blocks
    key_1J = pair[1] * k_block + jnp.arange(k_block)[None, :]
    conditions = []
    if settings.n_keys % k_block:
        conditions.append((key_1J < settings.n_keys)[:, None, :])
    if settings.causal or settings.window is not None:
        if settings.q_offset is None:
            behind = places.q_position_BT[:, :, None] - places.k_position_BS[:, None, :]
        else:
            behind = (settings.q_offset + pair[0] * q_block + jnp.arange(q_block))[None, :, None] - key_1J[:, None, :]
        if settings.causal:
            conditions.append(behind >= 0)
        if settings.window is not None:
            conditions.append(behind < settings.window)
    if places.q_ids_BT is not None:
        conditions.append(places.q_ids_BT[:, :, None] == places.k_ids_BS[:, None, :])
        conditions.append((places.q_ids_BT != 0)[:, :, None])
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _hidden(places: _Places, settings: _Settings):
    """Scalar bool: documents or positions surely hide this whole block; None where they say nothing."""
    conditions = []
    if places.q_ids_BT is not None:
        q_ids_BT, k_ids_BS = places.q_ids_BT, places.k_ids_BS
        high = jnp.iinfo(jnp.int32).max
        q_low_B, k_low_B = (jnp.min(jnp.where(ids == 0, high, ids), axis=1) for ids in (q_ids_BT, k_ids_BS))
        q_top_B, k_top_B = (jnp.max(jnp.where(ids == 0, -high, ids), axis=1) for ids in (q_ids_BT, k_ids_BS))
        conditions.append((q_top_B < k_low_B) | (k_top_B < q_low_B))
    if settings.q_offset is None:
        q_BT, k_BS = places.q_position_BT, places.k_position_BS
        if settings.causal:
            conditions.append(q_BT.max(axis=1) < k_BS.min(axis=1))
        if settings.window is not None:
            conditions.append(q_BT.min(axis=1) - k_BS.max(axis=1) >= settings.window)
    return jnp.all(functools.reduce(jnp.logical_or, conditions)) if conditions else None


def _walk(pairs: np.ndarray, visit, places: _Places, carry, read, write, settings: _Settings):
    """Applies visit to every pair: carry <- write(carry, pair, visit(read(carry, pair), pair, its places))."""

    def step(carry, pair):
        here = _block_places(places, pair, settings)
        block = read(carry, pair)
        hidden = _hidden(here, settings) if len(pairs) > 1 else None
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
def _attend(q_BKRTP, k_BKSP, v_BKSV, sinks_KR, places: _Places, settings: _Settings):
    return _attend_forward(q_BKRTP, k_BKSP, v_BKSV, sinks_KR, places, settings)[0]


def _attend_forward(q_BKRTP, k_BKSP, v_BKSV, sinks_KR, places: _Places, settings: _Settings):
    dtype = jnp.promote_types(q_BKRTP.dtype, jnp.float32)
    q_block, k_block = settings.blocks

    def read(carry, pair):
        return tuple(_at(array, pair[0], q_block, 3) for array in carry)

    def write(carry, pair, block):
        return tuple(_put(array, part, pair[0], q_block, 3) for array, part in zip(carry, block))

    def visit(block, pair, here):
        sum_BKRQV, top_BKRQ, total_BKRQ = block
        scores_BKRQJ, _ = _scores(_at(q_BKRTP, pair[0], q_block, 3), _at(k_BKSP, pair[1], k_block, 2), settings, dtype)
        mask = _mask(here, pair, settings)
        if mask is not None:
            mask = mask[:, None, None]
            scores_BKRQJ = jnp.where(mask, scores_BKRQJ, _HIDDEN)
        new_top_BKRQ = jnp.maximum(top_BKRQ, scores_BKRQJ.max(axis=-1))
        weights_BKRQJ = jnp.exp(scores_BKRQJ - new_top_BKRQ[..., None])
        weights_BKRQJ = weights_BKRQJ if mask is None else jnp.where(mask, weights_BKRQJ, 0)
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
        top_BKRT, total_BKRT = jnp.full_like(rows_BKRT, _HIDDEN, dtype), jnp.zeros_like(rows_BKRT, dtype)
    else:
        top_BKRT = jnp.zeros_like(rows_BKRT, dtype) + sinks_KR.astype(dtype)[:, :, None][None]
        total_BKRT = jnp.ones_like(rows_BKRT, dtype)
    sum_BKRTV = jnp.repeat(jnp.zeros_like(q_BKRTP[..., :1], dtype), v_BKSV.shape[-1], axis=-1)
    carry = (sum_BKRTV, top_BKRT, total_BKRT)
    pairs = _pairs(q_BKRTP.shape[3] // q_block, k_BKSP.shape[2] // k_block, settings)
    sum_BKRTV, top_BKRT, total_BKRT = _walk(pairs, visit, places, carry, read, write, settings)
    seen_BKRT = total_BKRT > 0
    total_BKRT = jnp.where(seen_BKRT, total_BKRT, 1)
    out_BKRTV = (sum_BKRTV / total_BKRT[..., None]).astype(q_BKRTP.dtype)
    log_sum_BKRT = jnp.where(seen_BKRT, top_BKRT + jnp.log(total_BKRT), 0)
    kept = checkpoint_name((out_BKRTV, log_sum_BKRT), "attention_kept")
    return out_BKRTV, (q_BKRTP, k_BKSP, v_BKSV, sinks_KR, places, *kept)


def _attend_backward(settings: _Settings, residuals, dout_BKRTV):
    q_BKRTP, k_BKSP, v_BKSV, sinks_KR, places, out_BKRTV, log_sum_BKRT = residuals
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
        mask = _mask(here, pair, settings)
        if mask is not None:
            mask = mask[:, None, None]
            scores_BKRQJ = jnp.where(mask, scores_BKRQJ, _HIDDEN)
        weights_BKRQJ = jnp.exp(scores_BKRQJ - _at(log_sum_BKRT, pair[0], q_block, 3)[..., None])
        weights_BKRQJ = weights_BKRQJ if mask is None else jnp.where(mask, weights_BKRQJ, 0)
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
    pairs = _pairs(q_BKRTP.shape[3] // q_block, k_BKSP.shape[2] // k_block, settings)
    dq, dk, dv = _walk(pairs, visit, places, carry, read, write, settings)
    dsinks_KR = None
    if sinks_KR is not None:
        sink_weights_BKRT = jnp.exp(sinks_KR.astype(dtype)[:, :, None][None] - log_sum_BKRT)
        dsinks_KR = -jnp.sum(sink_weights_BKRT * product_BKRT, axis=(0, 3)).astype(sinks_KR.dtype)
    grads = (grad.astype(array.dtype) for grad, array in zip((dq, dk, dv), (q_BKRTP, k_BKSP, v_BKSV)))
    return (*grads, dsinks_KR, None)


_attend.defvjp(_attend_forward, _attend_backward)
