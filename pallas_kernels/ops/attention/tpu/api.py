# SPDX-License-Identifier: Apache-2.0
"""Pallas TPU (Mosaic) implementation of `attention`: blocks, layouts, masks as arrays and the hand-written gradient.

The kernels stand in tpu_forward.py and tpu_backward.py. Few queries (decoding) go to tpu_decode.py, which reads the
cache where it lies; what it does not take, and gradients, are packed with the query heads of a key head into the rows
of one block.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.mosaic_tpu import F32, LANES, LOG2E, round_up
from pallas_kernels.ops.attention import block_pairs
from pallas_kernels.ops.attention.mask import Mask, key_positions, make_mask, query_positions
from pallas_kernels.ops.attention.tpu import backward as tpu_backward
from pallas_kernels.ops.attention.tpu import decode as tpu_decode
from pallas_kernels.ops.attention.tpu import forward as tpu_forward
from pallas_kernels.ops.attention.tpu.common import Settings

HEAD_WIDTHS = (64, 96, 128, 192, 256)
BLOCK = 1024  # queries and keys of a block; smaller where there are fewer
MOST_BLOCK_BYTES = 1024 * 256 * 2  # of a head's block
PACKED_ROWS = 256  # queries x heads of a key head up to which they share a block
MOST_WORDS = 1 << 16  # pairs of blocks listed in scalar memory


def supports(q, k, v, **kwargs) -> str | None:
    """Why the TPU kernel cannot serve this call of `attention`, or None if it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype of q_BTHP ({q.dtype}) not bfloat16 or float32"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtypes of k_BSKP and v_BSKP ({k.dtype}, {v.dtype}) not that of q_BTHP ({q.dtype})"
    for name, array in (("q_BTHP", q), ("v_BSKP", v)):
        if array.shape[3] not in HEAD_WIDTHS:
            return f"head width of {name} ({array.shape[3]}) not one of {HEAD_WIDTHS}"
    row_bytes = max(q.shape[3], v.shape[3]) * q.dtype.itemsize
    blocks = _block_sizes(q.shape[1], k.shape[1], q.shape[2] // k.shape[2], row_bytes)
    n_rows = q.shape[1] if blocks[2] == 1 else q.shape[1] * blocks[2]
    words = -(-n_rows // blocks[0]) * -(-k.shape[1] // blocks[1]) * q.shape[0]
    if words > MOST_WORDS:
        return (
            f"{q.shape[0]} rows of {q.shape[1]} queries and {k.shape[1]} keys: {words} block pairs above {MOST_WORDS}"
        )
    return None


def _block_sizes(n_queries: int, n_keys: int, group: int, row_bytes: int) -> tuple[int, int, int]:
    """(queries, keys of a block, heads packed into the rows of a query block)."""
    most = min(BLOCK, max(256, MOST_BLOCK_BYTES // row_bytes // 256 * 256))
    packed = group if n_queries * group <= PACKED_ROWS else 1
    q_block = min(most, round_up(n_queries * packed, 32 if packed > 1 or n_queries <= PACKED_ROWS else 256))
    k_block = min(most, round_up(n_keys, 256))
    return q_block, k_block, packed


def attention_tpu(
    q, k, v, *, gate=None, causal=True, window=None, segment_ids=None, positions=None, scale=None, softcap=None,
    sinks=None, q_offset=0, stacked=None, blocks=None, interpret=False,
):  # fmt: skip
    """See `pallas_kernels.attention` for arguments and result; segment_ids and positions are pairs here.

    stacked: (k, v, layer), where k and v are the entries `layer` of [L, B, S, K, P]: read from there if that is faster.
    blocks: (queries, keys) of a block, chosen by shape unless given, multiples of 256. interpret: run the kernels in
    Pallas' interpreter, on any platform. Raises NotImplementedError, with argument and limit, where `supports` gives a
    reason.
    """
    if reason := supports(q, k, v):
        raise NotImplementedError(reason)
    mask = make_mask(causal, window, segment_ids, positions, q_offset)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    call = _Call(scale=scale, softcap=softcap, blocks=blocks, interpret=interpret)
    if blocks is None and tpu_decode.serves(q.shape, k.shape, v.shape[3], q.dtype.itemsize):
        return _decode(call, q, k, v, gate, sinks, mask, stacked)
    return _in_blocks(call, q, k, v, gate, sinks, mask)


class _Call(typing.NamedTuple):
    """The arguments of attention that are neither arrays nor of the mask."""

    scale: float
    softcap: float | None
    blocks: tuple[int, int] | None
    interpret: bool | object


def _in_blocks(call: _Call, q, k, v, gate, sinks, mask):
    """The call by the kernels of blocks of queries."""
    _, n_queries, n_heads, width = q.shape
    n_keys, n_kv_heads, v_width = *k.shape[1:3], v.shape[3]
    group = n_heads // n_kv_heads
    q_block, k_block, packed = _block_sizes(n_queries, n_keys, group, max(width, v_width) * q.dtype.itemsize)
    if call.blocks is not None:
        q_block, k_block, packed = *call.blocks, 1
    if packed > 1:
        q = _pack(q, group)
        gate = gate if gate is None else _pack(gate, group)
    settings = Settings(
        heads=q.shape[2],
        kv_heads=n_kv_heads,
        width=width,
        v_width=v_width,
        scale=call.scale,
        softcap=call.softcap,
        causal=mask.causal,
        window=mask.window,
        ids=mask.has_ids or bool(q.shape[1] % q_block or n_keys % k_block),
        positions=mask.ordered,
        gate=_gate_kind(gate),
        sinks=sinks is not None,
        packed=packed,
        blocks=(q_block, k_block),
        natural=width % LANES == 0 and v_width % LANES == 0,
        interpret=call.interpret,
    )
    rows = None
    if sinks is not None:
        rows = jnp.tile(sinks.astype(F32).reshape(settings.heads, packed), (1, q.shape[1] // packed))
    out = _attend(settings, q, k, v, gate, rows, mask)
    return out if packed == 1 else _unpack(out, n_queries, group)


def _gate_kind(gate) -> str:
    return "" if gate is None else ("head", "channel")[gate.ndim - 3]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(call: _Call, q, k, v, gate, sinks, mask, stacked):
    """The call by the kernel for few queries; its gradient is that of `_in_blocks`."""
    n_keys, n_kv_heads, v_width = *k.shape[1:3], v.shape[3]
    n_queries, n_heads, width = q.shape[1:]
    positions = ("given" if mask.has_positions else "counted") if mask.ordered else ""
    layout = tpu_decode.choose_layout(n_kv_heads, width, v_width)
    settings = tpu_decode.Decode(
        layout=layout,
        joint=tpu_decode.joins(layout, q.shape, n_kv_heads, v_width),
        queries=n_queries,
        keys=n_keys,
        heads=n_heads,
        kv_heads=n_kv_heads,
        width=width,
        v_width=v_width,
        scale=call.scale,
        softcap=call.softcap,
        causal=mask.causal,
        window=mask.window,
        ids=mask.has_ids,
        positions=positions,
        gate=_gate_kind(gate),
        sinks=sinks is not None,
        tokens=tpu_decode.block_tokens(n_keys, n_kv_heads, max(width, v_width), q.dtype.itemsize),
        parts=tpu_decode.cores(),
        interpret=call.interpret,
    )
    q_positions = query_positions(mask, n_queries) if mask.ordered else None
    k_positions = mask.k_position_BS if mask.ordered else None
    mask = mask.replace(q_position_BT=q_positions, k_position_BS=k_positions, offset_B=None)
    k, v, layer = (k, v, None) if stacked is None else stacked
    return tpu_decode.decode(settings, q, k, v, gate, sinks, mask, layer)


def _decode_forward(call: _Call, q, k, v, gate, sinks, mask, stacked):
    del stacked  # k and v are its entries
    return jax.vjp(lambda *arrays: _in_blocks(call, *arrays, mask), q, k, v, gate, sinks)


def _decode_backward(call: _Call, gradient, dout):
    return *gradient(dout), None, None


_decode.defvjp(_decode_forward, _decode_backward)


def _pack(array, group: int):
    """[B, T, H, ...] as [B, T R, K, ...]: the R heads of a key head become queries."""
    n_batch, n_queries, n_heads = array.shape[:3]
    array = array.reshape(n_batch, n_queries, n_heads // group, group, *array.shape[3:])
    return jnp.moveaxis(array, 3, 2).reshape(n_batch, n_queries * group, n_heads // group, *array.shape[4:])


def _unpack(array, n_queries: int, group: int):
    """Undoes `_pack`."""
    n_batch, _, n_kv_heads, width = array.shape
    array = array.reshape(n_batch, n_queries, group, n_kv_heads, width)
    return jnp.moveaxis(array, 2, 3).reshape(n_batch, n_queries, n_kv_heads * group, width)


def _in_whole_blocks(mask: Mask, n_rows: int, n_keys: int, s: Settings) -> Mask:
    """The mask with ids and positions as far as it needs them, padded to whole blocks; NumPy where they are known now.

    Padding has id 0, and positions that do not widen the range of its block.
    """
    n_queries = n_rows // s.packed
    q_ids, k_ids = mask.q_ids_BT, mask.k_ids_BS
    if q_ids is None and s.ids:
        q_ids, k_ids = np.ones((1, n_queries), np.int32), np.ones((1, n_keys), np.int32)
    q_positions = k_positions = None
    if s.positions:
        q_positions, k_positions = query_positions(mask, n_queries), key_positions(mask, n_keys)
    given = (q_ids, k_ids, q_positions, k_positions)
    xp = np if all(isinstance(array, np.ndarray) for array in given if array is not None) else jnp

    def pad(array, repeats, block, mode):
        if array is None:
            return None
        array = xp.repeat(xp.asarray(array, dtype=np.int32), repeats, axis=1)
        return xp.pad(array, ((0, 0), (0, -array.shape[1] % block)), mode=mode)

    q_block, k_block = s.blocks
    return mask.replace(
        q_ids_BT=pad(q_ids, s.packed, q_block, "constant"),
        k_ids_BS=pad(k_ids, 1, k_block, "constant"),
        q_position_BT=pad(q_positions, s.packed, q_block, "edge"),
        k_position_BS=pad(k_positions, 1, k_block, "edge"),
        offset_B=None,
    )


def _arrays(s: Settings, mask: Mask, **named) -> dict:
    """The kernels' inputs by name: [B, tokens, H, width] padded to whole blocks and laid out, masks as rows."""
    arrays = {}
    for name, array in named.items():
        block = s.blocks[name in ("k", "v")]
        padding = -array.shape[1] % block
        array = jnp.pad(array, ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2)) if padding else array
        if array.ndim == 3:  # a gate by head, as rows
            arrays[name] = jnp.moveaxis(array, 2, 1)[:, :, None].astype(F32)
        else:
            arrays[name] = array.reshape(*array.shape[:2], -1) if s.natural else jnp.moveaxis(array, 2, 1)
    sides = (mask.q_ids_BT, mask.k_ids_BS, mask.q_position_BT, mask.k_position_BS)
    for name, array in zip(("q_ids", "k_ids", "q_positions", "k_positions"), sides, strict=True):
        if array is not None:
            arrays[name] = jnp.asarray(array, jnp.int32)[:, None]
    return arrays


def _restore(array, like, s: Settings):
    """[B, T, H, width] out of the kernels' layout."""
    width = array.shape[-1] // like.shape[2] if s.natural else array.shape[-1]
    array = array.reshape(*array.shape[:2], like.shape[2], width) if s.natural else jnp.moveaxis(array, 1, 2)
    return array[:, : like.shape[1]]


def _words(pairs: block_pairs.Pairs):
    return block_pairs.Pairs(jnp.asarray(pairs.words_BN), pairs.count)


def _run_forward(s: Settings, q, k, v, gate, sink_rows, mask, residuals: bool):
    mask = _in_whole_blocks(mask, q.shape[1], k.shape[1], s)
    named = {"q": q, "k": k, "v": v} | ({} if gate is None else {"gate": gate})
    arrays = _arrays(s, mask, **named)
    if sink_rows is not None:
        padding = -q.shape[1] % s.blocks[0]
        arrays["sinks"] = jnp.pad(sink_rows, ((0, 0), (0, padding)))[None, :, None]
    pairs = _words(block_pairs.by_query(_for_pairs(mask, q, k, s), s.blocks))
    found = tpu_forward.forward(arrays, pairs, s, residuals=residuals)
    return {name: array if name == "log_sum" else _restore(array, q, s) for name, array in found.items()}


def _for_pairs(mask: Mask, q, k, s: Settings) -> Mask:
    """The mask, by ids where it has neither ids nor positions and everything is visible."""
    if s.ids or s.positions:
        return mask
    n_queries, n_keys = (round_up(array.shape[1], block) for array, block in zip((q, k), s.blocks))
    return mask.replace(q_ids_BT=np.ones((1, n_queries), np.int32), k_ids_BS=np.ones((1, n_keys), np.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(s: Settings, q, k, v, gate, sink_rows, mask):
    return _run_forward(s, q, k, v, gate, sink_rows, mask, residuals=False)["out"]


def _attend_forward(s: Settings, q, k, v, gate, sink_rows, mask):
    found = _run_forward(s, q, k, v, gate, sink_rows, mask, residuals=True)
    kept = checkpoint_name((found.get("ungated", found["out"]), found["log_sum"]), "attention_kept")
    out = found["out"] if "ungated" in found else kept[0]  # by its name, from which others begin again
    return out, (q, k, v, gate, sink_rows, mask, *kept)


def _attend_backward(s: Settings, residuals, dout):
    q, k, v, gate, sink_rows, mask, out, log_sum = residuals
    mask = _in_whole_blocks(mask, q.shape[1], k.shape[1], s)
    n_queries = q.shape[1]
    wide_dout, wide_out = dout.astype(F32), out.astype(F32)
    dgate = None
    if gate is not None:
        opened = jax.nn.sigmoid(gate.astype(F32))
        opened = opened if gate.ndim == 4 else opened[..., None]
        product = wide_dout * wide_out * opened * (1.0 - opened)
        dgate = (product if gate.ndim == 4 else product.sum(-1)).astype(gate.dtype)
        wide_dout = wide_dout * opened
    delta_BHT = jnp.moveaxis(jnp.sum(wide_dout * wide_out, axis=-1), 2, 1)
    dsinks = None
    if sink_rows is not None:
        share = jnp.exp2((sink_rows * LOG2E)[None] - log_sum[:, :, 0, :n_queries])
        dsinks = -jnp.sum(share * delta_BHT, axis=0)
    arrays = _arrays(s, mask, q=q, k=k, v=v, do=wide_dout.astype(v.dtype))
    arrays["log_sum"] = log_sum
    arrays["delta"] = jnp.pad(delta_BHT, ((0, 0), (0, 0), (0, -n_queries % s.blocks[0])))[:, :, None]
    parts = tpu_backward.choose_parts(log_sum.shape[-1], q.dtype.itemsize, s)
    pairs = _words(block_pairs.by_key(_for_pairs(mask, q, k, s), s.blocks, parts))
    found = tpu_backward.backward(arrays, pairs, parts, s)
    if parts > 1:
        found |= {name: found[name].sum(0).astype(k.dtype) for name in ("dk", "dv")}
    dq, dk, dv = _restore(found["dq"], q, s), _restore(found["dk"], k, s), _restore(found["dv"], v, s)
    return dq, dk, dv, dgate, dsinks, None


_attend.defvjp(_attend_forward, _attend_backward)
