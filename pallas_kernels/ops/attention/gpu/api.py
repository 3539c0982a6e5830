# SPDX-License-Identifier: Apache-2.0
"""`attention` on Hopper GPUs through Pallas Mosaic GPU, forward and hand-written backward; bfloat16.

The output gate is applied in the forward kernel's registers. Its gradient needs no pass over the scores: with
s = sigmoid(gate) and out = s o,

    do = s dout        delta = sum_P do o        dgate = dout o s (1 - s)

o is stored beside out for the backward: recovered from the rounded out it would cost queries with few keys, whose score
gradients cancel, their accuracy.

Few queries against many keys (decoding) go through the forward kernel too: the query heads of a key head become rows of
one tile, the key blocks are dealt out to parts in turn, so that all have as many visible ones however full a cache is,
and the parts' results are put together by their log-sum-exp.

Kernels: `gpu_forward`, `gpu_backward`; masks: `gpu_masks`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import platform
from pallas_kernels.mosaic_gpu import F32, LOG2E, TILE
from pallas_kernels.ops.attention.gpu import backward as gpu_backward
from pallas_kernels.ops.attention.gpu import forward as gpu_forward
from pallas_kernels.ops.attention.gpu import masks as gpu_masks
from pallas_kernels.ops.attention.gpu.backward import Backward
from pallas_kernels.ops.attention.gpu.forward import Forward
from pallas_kernels.ops.attention.gpu.masks import Bounds, Vectors
from pallas_kernels.ops.attention.mask import LOWEST, make_mask
from pallas_kernels.ops.attention.xla import cudnn_serves
from pallas_kernels.varying import vary_alike

WIDTHS = (64, 128, 192, 256)  # of the kernels; others are padded to the next, 192 to 256 in the backward
ROW_MULTIPLE = 384  # of rows of per-query vectors: whole query blocks of every kernel
KEY_MULTIPLE = 128
SHORT = 8192  # queries: the schedules that were faster at 4,096 serve up to here, those faster at 16,384 beyond
DECODE_TILES = 8  # a multiprocessor, to cut the keys for
DECODE_KEYS = 512  # of a part, at least
TOKEN_MULTIPLE = 8  # of q, k, v and gate: what the copy engine's tiles ask for; it hides what lies behind


def supports(q, k, v, **kwargs) -> str | None:
    """Why the GPU kernels cannot serve this call of `attention`, or None if they can."""
    for name, array in (("q_BTHP", q), ("k_BSKP", k), ("v_BSKP", v)):
        if array.dtype != jnp.bfloat16:
            return f"dtype of {name} ({array.dtype}) is not bfloat16"
        if array.shape[3] > WIDTHS[-1]:
            return f"head width of {name} ({array.shape[3]}) above {WIDTHS[-1]}"
    return None


def slower(q, k, v, *, causal=True, q_offset=0, **kwargs) -> str | None:
    """Why `xla`, which leaves such calls to cuDNN, is faster at this one; or None. Heeded by `auto` alone."""
    rest = ("gate", "window", "segment_ids", "positions", "softcap", "sinks")
    plain = all(kwargs.get(name) is None for name in rest) and isinstance(q_offset, int) and q_offset == 0
    if plain and causal and q.shape[2] == k.shape[2] and q.shape[3] > 64 and cudnn_serves(q, k, v, causal, None):
        return f"cuDNN's gradients are faster for as many key heads as heads ({k.shape[2]}) without gate and documents"
    return None


def _pad(array, axis: int, missing: int):
    if array is None or not missing:
        return array
    return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])


def attention_gpu(
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
    stacked=None,
    q_wide=None,
    kv=None,
):
    """See `pallas_kernels.attention`; segment_ids and positions are pairs here.

    kv: None, or [B, S, 2 K, P], in whose last heads v_BSKP is read, and to which go the gradients of keys and values.
    stacked: (k, v, layer), where k and v are the entries `layer` of [L, B, S, K, P]: few queries read them there.
    """
    n_batch, n_queries, n_heads, d_head = q_BTHP.shape
    n_keys, n_kv_heads, d_value = v_BSKP.shape[1:]
    scale = d_head**-0.5 if scale is None else scale
    width = next(w for w in WIDTHS if w >= max(d_head, d_value))
    elementwise = gate is not None and gate.ndim == 4
    pad = lambda a: a if a is None else _pad(_pad(a, 3, width - d_head), 1, -a.shape[1] % TOKEN_MULTIPLE)
    q, k, q_wide = (pad(a) for a in (q_BTHP, k_BSKP, q_wide))
    v = _pad(_pad(v_BSKP, 3, width - d_value), 1, -n_keys % TOKEN_MULTIPLE)
    gate = _pad(gate, 1, -n_queries % TOKEN_MULTIPLE)
    if elementwise:
        gate = _pad(gate, 3, width - d_value)

    mask = make_mask(causal, window, segment_ids, positions, q_offset)
    bounds = gpu_masks.make_bounds(mask, n_queries, n_keys)
    same = {
        "softcap": softcap,
        "scale": float(scale),
        "ids": mask.has_ids,
        "positions": mask.has_positions,
        "masks_batch": bounds.start_MT.shape[0] > 1,
    }
    forward = Forward(
        n_batch,
        n_heads,
        n_kv_heads,
        width,
        n_queries,
        n_keys,
        gate=None if gate is None else "elementwise" if elementwise else "head",
        sinks=sinks is not None,
        multiprocessors=platform.multiprocessors() if n_queries <= SHORT else None,
        **same,
    )
    backward = Backward(n_batch, n_heads, n_kv_heads, 256 if width == 192 else width, n_keys, **same)
    decode = _decode_vectors(forward, bounds, n_keys)
    source = None
    if decode is not None and stacked is not None and k.shape == k_BSKP.shape and v.shape == v_BSKP.shape:
        rows = tuple(array.reshape(-1, *array.shape[2:]) for array in stacked[:2])
        source = (*rows, jnp.reshape(stacked[2] * n_batch, 1))
    if kv is not None and decode is None and d_head == d_value == backward.width:  # padded it would be copied
        v = _pad(kv, 1, -n_keys % TOKEN_MULTIPLE)
        forward, backward = (kernel.replace(v_head=n_kv_heads) for kernel in (forward, backward))
    forward, backward, vectors = _vectors(forward, backward, bounds, n_queries, n_keys)
    vectors, decode = jax.tree.map(jnp.asarray, (vectors, decode))
    out = _attend(forward, backward, q, k, v, gate, sinks, vectors, decode, source, q_wide)
    return out[:, :n_queries, :, :d_value]


def _vectors(forward: Forward, backward: Backward, bounds: Bounds, n_queries: int, n_keys: int):
    """(both kernels, without the loops that are known to be empty; what they read of the mask)."""
    key_ranges = gpu_masks.key_ranges(bounds, n_keys, forward.block_q, forward.block_k)
    query_ranges = gpu_masks.query_ranges(bounds, n_keys, backward.block_q, backward.block_k)
    if isinstance(key_ranges, np.ndarray):
        lo, a, b, hi = np.moveaxis(key_ranges, 2, 0)
        forward = forward.replace(first_masked=bool((a > lo + 1).any()), last_masked=bool((b < hi).any()))
        lo, a, b, hi = np.moveaxis(query_ranges, 2, 0)
        backward = backward.replace(first_masked=bool((lo < a).any()), last_masked=bool((b < hi).any()))
    queries = gpu_masks.query_rows(bounds, n_queries + -n_queries % ROW_MULTIPLE)
    keys = gpu_masks.key_rows(bounds, n_keys + -n_keys % KEY_MULTIPLE)
    return forward, backward, Vectors(queries, keys, key_ranges, query_ranges)


def _decode_forward(forward: Forward) -> Forward:
    """The kernel for few queries: those of all heads of a group are rows of one tile, its keys are cut into parts."""
    tiles = forward.batch * forward.kv_heads
    return forward.replace(
        heads=forward.kv_heads,
        queries=forward.queries * (forward.heads // forward.kv_heads),
        gate=None,
        sinks=False,
        first_masked=True,
        last_masked=True,
        save=True,
        alternate=False,
        few=True,
        parts=max(1, min(DECODE_TILES * platform.multiprocessors() // tiles, forward.keys // DECODE_KEYS)),
    )


def _decode_vectors(forward: Forward, bounds: Bounds, n_keys: int) -> Vectors | None:
    """What the decoding kernel reads of the mask; None for calls with many queries or few keys."""
    kernel = _decode_forward(forward)
    if kernel.queries > TILE or n_keys < DECODE_KEYS:
        return None
    group = forward.heads // forward.kv_heads
    start, end, q_ids = (a if a is None else a.repeat(group, axis=1) for a in bounds[:3])
    packed = bounds._replace(start_MT=start, end_MT=end, q_ids_MT=q_ids)
    ranges = gpu_masks.key_ranges(packed, n_keys, kernel.block_q, kernel.block_k)
    keys = gpu_masks.key_rows(bounds, n_keys + -n_keys % KEY_MULTIPLE)
    return Vectors(gpu_masks.query_rows(packed, kernel.block_q), keys, ranges, ranges)


def _decode(forward: Forward, q, k, v, gate, sinks, vectors: Vectors, source):
    """out of the parts of the keys, put together in float32; `source` as in `_attend`."""
    n_batch, n_queries, group = forward.batch, forward.queries, forward.heads // forward.kv_heads
    kernel = _decode_forward(forward)
    q_BTKRP = q[:, :n_queries].reshape(n_batch, n_queries, forward.kv_heads, group, -1)
    rows = jnp.swapaxes(q_BTKRP, 2, 3).reshape(n_batch, kernel.queries, forward.kv_heads, -1)
    rows = _pad(rows, 1, -kernel.queries % TOKEN_MULTIPLE)
    first = None
    if source is not None:
        kernel, (k, v, first) = kernel.replace(stacked=True), source
    out, lse = _forward_kernel(kernel, rows, k, v, vectors.queries, vectors.key_ranges, vectors.keys, None, None, first)

    def unpack(array, *rest):
        """[B parts, rows, K, ...] -> [B, parts, T, H, ...]"""
        array = array[:, : kernel.queries].reshape(n_batch, kernel.parts, n_queries, group, forward.kv_heads, *rest)
        return jnp.swapaxes(array, 3, 4).reshape(n_batch, kernel.parts, n_queries, forward.heads, *rest)

    out, lse = unpack(out, out.shape[3]).astype(F32), unpack(jnp.swapaxes(lse, 1, 2))
    lse = jnp.where(lse == jnp.inf, LOWEST, lse)
    top = lse.max(1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, _sinks_log2(sinks)[None, None, None])
    weights = jnp.where(lse == LOWEST, 0.0, jnp.exp2(lse - top))
    total = weights.sum(1) + (0.0 if sinks is None else jnp.exp2(_sinks_log2(sinks)[None, None] - top[:, 0]))
    out = (out * weights[..., None]).sum(1) / jnp.where(total == 0.0, 1.0, total)[..., None]
    if gate is not None:
        out *= jax.nn.sigmoid(gate[:, :n_queries].astype(F32)).reshape(*out.shape[:3], -1)
    return out.astype(q.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _forward_kernel(cfg: Forward, *arrays):
    """`gpu_forward.forward`: one call after the other under vmap; lowered once for all calls of a program alike."""
    results = jax.custom_batching.sequential_vmap(functools.partial(gpu_forward.forward, cfg))(*arrays)
    return vary_alike((arrays, results))[1]


@functools.partial(jax.jit, static_argnums=0)
def _backward_kernel(cfg: Backward, *arrays):
    results = jax.custom_batching.sequential_vmap(functools.partial(gpu_backward.backward, cfg))(*arrays)
    return vary_alike((arrays, results))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(forward: Forward, backward: Backward, q, k, v, gate, sinks, vectors, decode, source, q_wide):
    """out for widths the kernels take; T and S multiples of 8.

    vectors, decode: `Vectors` of the kernels for many queries and, where keys are cut, for few; else None.
    source: None, or k and v [L B, S, K, P] and the first row to read, [1], for decoding to read instead of k and v.
    q_wide: None, or what gets the gradient of q in its place, float32.
    v: where the kernels have a `v_head`, keys of which only the gradient is put there, and the values.
    """
    if decode is not None:
        return _decode(forward, q, k, v, gate, sinks, decode, source)
    return _run_forward(forward, q, k, v, gate, sinks, vectors)[0]


def _sinks_log2(sinks):
    return None if sinks is None else jnp.maximum(sinks.astype(F32) * LOG2E, LOWEST)


def _run_forward(forward, q, k, v, gate, sinks, vectors):
    if forward.gate == "head":
        gate = jnp.swapaxes(gate[:, : forward.queries].astype(F32), 1, 2)
        gate = _pad(gate, 2, forward.blocks * forward.block_q - forward.queries)
    elif gate is not None:
        gate = gate.astype(q.dtype)
    sinks = _sinks_log2(sinks)
    return _forward_kernel(forward, q, k, v, vectors.queries, vectors.key_ranges, vectors.keys, sinks, gate)


def _attend_forward(forward, backward, q, k, v, gate, sinks, vectors, decode, source, q_wide):
    del decode, source
    out, lse, *ungated = _run_forward(forward.replace(save=True), q, k, v, gate, sinks, vectors)
    kept = checkpoint_name((*(ungated or [out]), lse), "attention_kept")
    vectors = checkpoint_name(vectors, "attention_kept")  # small, and made by as many programs as there are arrays
    out = out if ungated else kept[0]  # by its name, from which others begin again
    return out, (q, k, v, gate, sinks, vectors, None if q_wide is None else (), *kept)


def _attend_backward(forward, backward, residuals, dout):
    q, k, v, gate, sinks, vectors, wide, out, lse = residuals
    wide_dout, out = dout.astype(F32), out.astype(F32)
    do, dgate = dout, None
    if gate is not None:
        open_ = jax.nn.sigmoid(gate.astype(F32)).reshape(*gate.shape[:3], -1)
        do = lax.reduce_precision(wide_dout * open_, 8, 7)  # XLA may leave out a conversion to bfloat16 and back
        dgate = wide_dout * out * (open_ * (1 - open_))
        dgate = (dgate if forward.gate == "elementwise" else dgate.sum(3)).astype(gate.dtype)
    delta_BTH = (do.astype(F32) * out).sum(3)
    do = do.astype(q.dtype)
    delta_BHT = jnp.swapaxes(delta_BTH, 1, 2)
    width = q.shape[3]
    q, k, v, do = (_pad(array, 3, backward.width - width) for array in (q, k, v, do))
    grads = _backward_kernel(backward, q, k, v, do, lse, delta_BHT, vectors.queries, vectors.query_ranges, vectors.keys)
    dq, dk, dv = (None if grad is None else grad[..., :width] for grad in grads)
    dq = dq * backward.scale
    dq, dq_wide = (dq.astype(q.dtype), None) if wide is None else (None, dq)
    dsinks = None
    if sinks is not None:
        weights = jnp.exp2(_sinks_log2(sinks)[None, :, None] - lse[:, :, : forward.queries])
        dsinks = -(weights * delta_BHT[:, :, : forward.queries]).sum((0, 2)).astype(sinks.dtype)
    return dq, dk, dv, dgate, dsinks, None, None, None, dq_wide


_attend.defvjp(_attend_forward, _attend_backward)
