# SPDX-License-Identifier: Apache-2.0
"""Mamba-2 chunked scan (SSD) on Hopper GPUs through Pallas Mosaic GPU, forward and hand-written backward.

The forward is one fused walk over the chunks (``gpu_walk``); few long rows of few heads are cut into pieces whose start
states come from a first, state-only walk. The backward walks the state's gradient in reverse, then visits all chunks in
parallel (``gpu_grads``). Only per-token vectors (``dt``, cumulative decays, document masks) are prepared by XLA.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import platform
from pallas_kernels.mosaic_gpu import F32, LOG2E, TILE
from pallas_kernels.ops.ssd.gpu import decay as gpu_decay
from pallas_kernels.ops.ssd.gpu import grads as gpu_grads
from pallas_kernels.ops.ssd.gpu import walk as gpu_walk
from pallas_kernels.ops.ssd.gpu.grads import Grads
from pallas_kernels.ops.ssd.gpu.walk import Walk
from pallas_kernels.ops.ssd.turns import turn_gradients

MAX_STATE = 256
FULL_ENOUGH = 0.6  # share of the device's multiprocessors above which rows are not cut into pieces
LEAST_PIECE = 8  # chunks of a piece
LEAST_PART = 4  # chunks of a part of one
LEAST_SPLIT = 4  # heads of a part of a group that may be cut in two
TOKEN_MULTIPLE = 8  # of the arrays' tokens: what the copy engine's tiles ask for


def _round_up(n, m):
    return -(-n // m) * m


def decay_vectors(dt, a_log2, chunks, begun=None):
    """Cumulative log2 decay ``a`` and ``a - log2(dt)`` within chunks: ``[B, chunks, H, 2, 64]`` (dt ``[B, T, H]``).

    ``a_log2``: rates ``[H]`` that dt is multiplied with, or log2 decays ``[B, T, H]`` of their own. ``begun [B, chunks,
    64]``: documents that begin in the chunk up to each token; each takes all weight away.
    """
    dt = _chunked(dt, chunks)
    steps = dt * a_log2[:, None][None, None] if a_log2.ndim == 1 else _chunked(a_log2, chunks)
    lower = jnp.tril(jnp.ones((TILE, TILE), F32))
    a = jnp.einsum("bchj,ij->bchi", steps, lower, precision=lax.Precision.HIGHEST)
    if begun is not None:
        a -= gpu_decay.BETWEEN_DOCUMENTS * begun[:, :, None]
    return jnp.stack([a, a - jnp.log2(dt)], axis=3)


def document_vectors(segment_ids, chunks):
    """What the kernels know of documents, float32 ``[B, chunks, 64]`` each: padding, and documents begun.

    The first is 1 on real tokens, 0 on padding (which takes part in the document before it), and 2 all over a chunk
    without padding. The second counts the documents that begin in the chunk, up to each token; the row's first one does
    not count, as it sees the initial state.
    """
    batch, tokens = segment_ids.shape
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, chunks * TILE - tokens)))
    real = segment_ids != 0
    index = jnp.arange(chunks * TILE, dtype=jnp.int32)
    before = lax.cummax(jnp.where(real, index, -1), axis=1)
    before = jnp.pad(before[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    before_id = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    first = (real & (before >= 0) & (before_id != segment_ids)).reshape(batch, chunks, TILE)
    real = real.reshape(batch, chunks, TILE)
    real = jnp.where(real.all(-1, keepdims=True), 2.0, real.astype(F32))
    return real, jnp.cumsum(first.astype(F32), axis=-1)


def supports(x, dt, A, B, C, *, states=None, **more):
    """None if the kernels can serve the call, else the reason."""
    del dt, A, more
    if states == "float32":
        return "states ('float32'): they are kept in bfloat16 or recomputed"
    if x.dtype != jnp.bfloat16:
        return f"dtype of x_BTHP ({x.dtype}) is not bfloat16"
    for name, array in (("B_BTGN", B), ("C_BTGN", C)):
        if array.dtype != B.dtype or array.dtype not in (jnp.bfloat16, jnp.float32):
            return f"dtype of {name} ({array.dtype}) not bfloat16 or float32, or not that of B_BTGN ({B.dtype})"
    if B.shape[-1] > MAX_STATE:
        return f"state size of B_BTGN ({B.shape[-1]}) above {MAX_STATE}"
    return None


def choose_pieces(blocks, chunks):
    """Parts of the sequence walked in parallel, so that ``blocks`` thread blocks each fill the device."""
    multiprocessors = platform.multiprocessors()
    if blocks >= FULL_ENOUGH * multiprocessors:
        return 1
    return max(1, min(multiprocessors // blocks, chunks // LEAST_PIECE))


def piece_starts(local, ab, init, pieces, size, reverse=False):
    """Start states of pieces of ``size`` chunks, ``[B, pieces, H, 64, N]``.

    local: end states of the parts, equally many, of every piece but the one that nothing starts behind: the last, or
    the first in reverse. They start from zero.
    """
    parts = local.shape[1] // (pieces - 1)
    states, end = _through(local, ab, init, reverse, size if reverse else 0, size // parts)
    starts = [end, *states[parts - 1 :: parts]] if reverse else [*states[::parts], end]
    return jnp.stack(starts, axis=1)


def _through(local, ab, init, reverse, begin, size):
    """(the states that parts of ``size`` chunks from chunk ``begin`` on start from, the state behind all)."""
    parts, heads = local.shape[1:3]
    log_decay = ab[:, begin : begin + parts * size, :, 0, -1]
    log_decay = jnp.pad(log_decay, ((0, 0), (0, parts * size - log_decay.shape[1]), (0, 0)))
    decay = jnp.exp2(log_decay.reshape(-1, parts, size, heads).sum(2))
    states, state = [None] * parts, jnp.zeros_like(local[:, 0]) if init is None else init
    for p in range(parts - 1, -1, -1) if reverse else range(parts):
        states[p] = state
        state = decay[:, p, :, None, None] * state + local[:, p]
    return states, state


def choose_parts(blocks, pieces, size):
    """Parts, even ones, of each piece of ``size`` chunks that the first walk takes in parallel, all pieces but one."""
    most = max(1, platform.multiprocessors() // blocks // (pieces - 1))
    fit = [n for n in range(2, most + 1) if size % (2 * n) == 0 and size // n >= LEAST_PART]
    return max(fit, default=1)


def _with_enough_blocks(cfg):
    """One head a thread block where that, and not two, fills the device: no row is cut, and nothing is walked twice."""
    two, one = cfg.batch * cfg.heads // cfg.block_heads, cfg.batch * cfg.heads
    fills = two < FULL_ENOUGH * platform.multiprocessors() <= one
    return dataclasses.replace(cfg, most_heads=1) if fills else cfg


def run_walk(cfg, x, ab, b_mat, c_mat, real, d, init):
    """Walk with start state ``init [B, H, 64, N]`` (None: zero), cut into pieces where heads cannot fill the device.

    Returns (y or None, final state or None, states or None), as ``cfg`` asks.
    """
    cfg = _with_enough_blocks(cfg)
    blocks = cfg.batch * cfg.heads // cfg.block_heads
    pieces = choose_pieces(blocks, cfg.chunks)
    replace = functools.partial(dataclasses.replace, cfg)
    starts = None if init is None else init[:, None]
    if pieces > 1:
        size = replace(pieces=pieces).piece_chunks
        parts = choose_parts(blocks, pieces, size)
        first = replace(
            pieces=(pieces - 1) * parts, size=size // parts, begin=size if cfg.reverse else 0,
            emit_y=False, emit_states=False, emit_final=True, has_init=False, has_d=False,
        )  # fmt: skip
        [local] = gpu_walk.walk(first, x, ab, b_mat, None, real, None, None)
        starts = piece_starts(local, ab, init, pieces, size, cfg.reverse)
    main = replace(pieces=pieces, has_init=starts is not None)
    outs = iter(gpu_walk.walk(main, x, ab, b_mat, c_mat, real, d, starts))
    y = next(outs) if cfg.emit_y else None
    final = next(outs)[:, 0 if cfg.reverse else -1] if cfg.emit_final else None
    return y, final, (next(outs) if cfg.emit_states else None)


def _config(x, b_mat, d, ids):
    batch, tokens, heads, _ = x.shape
    chunks = 2 * -(-tokens // (2 * TILE))
    return Walk(
        batch,
        tokens,
        heads,
        *b_mat.shape[2:],
        chunks,
        1,
        segments=ids is not None,
        has_d=d is not None,
    )


def _skip_rows(d):
    return None if d is None else jnp.broadcast_to(d.astype(F32).reshape(d.shape[0], -1), (d.shape[0], TILE))


def _chunked(v, chunks):
    """[B, T, H] -> [B, chunks, H, 64], zeros behind T."""
    batch, tokens, heads = v.shape
    v = jnp.pad(v, ((0, 0), (0, chunks * TILE - tokens), (0, 0)))
    return v.reshape(batch, chunks, TILE, heads).transpose(0, 1, 3, 2)


def _real_dt(dt, ids):
    return dt if ids is None else jnp.where((ids != 0)[..., None], dt, 0.0)


def _cleared(v, ids):
    """``v [B, T, G, N]`` (or its first tokens) with zeros on padding."""
    return v if ids is None else jnp.where((ids[:, : v.shape[1]] != 0)[..., None, None], v, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(9, 10))
def _core(x, dt, a, b_mat, c_mat, d, ids, init, turn, with_final, turns):
    """y and final state (None unless ``with_final``) for widths the kernels take.

    P = 64, N a multiple of 64, T of 8; a [H], or log decays [B, T, H] in place of dt a; d [H], [H, 64] or None; init
    may be None. B and C may be float32: rounded for their products, with gradients that are not. With ``turns``
    tokens read nothing of themselves, and the zeros ``turn [B, T, G, count]`` have a gradient.
    """
    del turn
    b_mat, c_mat = b_mat.astype(x.dtype), c_mat.astype(x.dtype)
    return _forward(x, dt, a, b_mat, c_mat, d, ids, init, with_final, turns, False)[:2]


def _decays(cfg, dt, a, ids):
    """(vectors of decays, what is real or None) as the walk takes them."""
    if a.ndim == 1 and cfg.heads % gpu_decay.HEADS == 0:
        return gpu_decay.decays(dt, a, ids, cfg.chunks)
    real, begun = (None, None) if ids is None else document_vectors(ids, cfg.chunks)
    rates = a if a.ndim == 1 else _real_dt(a, ids)
    return decay_vectors(_real_dt(dt, ids), rates * LOG2E, cfg.chunks, begun), real


def _forward(x, dt, a, b_mat, c_mat, d, ids, init, with_final, turns, emit_states):
    cfg = _config(x, b_mat, d, ids)
    cfg = dataclasses.replace(cfg, emit_y=True, emit_states=emit_states, emit_final=with_final)
    if turns is not None:
        cfg = dataclasses.replace(cfg, alone=turns.alone)
    ab, real = _decays(cfg, dt, a, ids)
    y, final, states = run_walk(cfg, x, ab, b_mat, c_mat, real, None if d is None else d.astype(F32), init)
    return y, final, states, ab, real


def _core_fwd(x, dt, a, b_mat, c_mat, d, ids, init, turn, with_final, turns):
    del turn
    given = jnp.zeros(0, b_mat.dtype)
    b_mat, c_mat = b_mat.astype(x.dtype), c_mat.astype(x.dtype)
    y, final, states, ab, real = _forward(x, dt, a, b_mat, c_mat, d, ids, init, with_final, turns, True)
    states = checkpoint_name(states, "ssd_states")
    left = None if turns is None else final
    return (y, final), (x, dt, a, b_mat, c_mat, d, ids, init, states, ab, real, given, left)


def choose_splits(blocks, heads):
    """Parts of a group's heads for the gradient kernel, so that ``blocks`` thread blocks each fill the device."""
    splits, multiprocessors = 1, platform.multiprocessors()
    while blocks * splits < multiprocessors and heads % (2 * splits) == 0 and heads // splits >= LEAST_SPLIT:
        splits *= 2
    return splits


def _spans(v):
    """[B, chunks, ...] -> [B, spans, 2, ...]"""
    return v.reshape(v.shape[0], -1, 2, *v.shape[2:])


def _decay_grads(net, end):
    """d loss / d log decay ``[B, chunks, 64, H]`` of each token.

    The log decay of token t acts on all pairs j < t <= i: the sum of ``net = dy . y - x . v`` over tokens i >= t of the
    span, plus what reaches the span's end. Documents that begin behind t cancel in it. net ``[B, spans, 2, H, 64]``,
    end ``[B, spans, H]``.
    """
    same = jnp.triu(jnp.ones((TILE, TILE), F32))
    grads = jnp.einsum("bkshi,ti->bksth", net, same, precision=lax.Precision.HIGHEST)
    later = jnp.stack([net[:, :, 1].sum(-1) + end, end], axis=2)[:, :, :, None]
    return (grads + later).reshape(net.shape[0], -1, TILE, net.shape[3])


def _rounded_start(init, dy, c_mat, ab, ids, r_states):
    """What the rounding of the caller's float32 state to bfloat16 takes from ``dy . y`` ``[B, 2, H, 64]`` and <R, h>.

    Where decays are weak the gradient of A is a small difference of large sums over this state.
    """
    batch, heads = init.shape[:2]
    rest = (init - lax.reduce_precision(init, 8, 7)).astype(jnp.bfloat16)
    ends = jnp.exp2(ab[:, :2, :, 0, -1])
    decay = jnp.exp2(ab[:, :2, :, 0])
    decay = jnp.stack([decay[:, 0], decay[:, 1] * ends[:, 0, :, None]], axis=1)

    def first(v):
        v = v[:, : 2 * TILE]
        return jnp.pad(v, ((0, 0), (0, 2 * TILE - v.shape[1]), (0, 0), (0, 0)))

    c_mat, dy = first(_cleared(c_mat[:, : 2 * TILE], ids)), first(_cleared(dy[:, : 2 * TILE], ids))
    rest_g = rest.reshape(batch, c_mat.shape[2], -1, TILE, rest.shape[-1])
    y = jnp.einsum("bign,bgrpn->bigrp", c_mat, rest_g, preferred_element_type=F32)
    rows = (y.reshape(dy.shape) * dy.astype(F32)).sum(-1).reshape(batch, 2, TILE, heads).swapaxes(2, 3)
    state = (r_states[:, 0].astype(F32) * rest.astype(F32)).sum((-2, -1))
    return rows * decay, state * ends[:, 0] * ends[:, 1]


def _joined(parts, tokens, odd=None):
    """Sum of parts of dB or dC ``[B, splits, chunks, 64, G, N]`` as ``[B, T, G, N]``; ``odd`` goes to odd chunks."""
    total = parts.sum(1) if parts.shape[1] > 1 else parts[:, 0]
    if odd is not None:
        total += jnp.pad(odd.sum(1)[:, :, None], ((0, 0), (0, 0), (1, 0)) + 3 * ((0, 0),)).reshape(total.shape)
    return total.reshape(total.shape[0], -1, *total.shape[3:])[:, :tokens]


def _dt_grads(out, dt, a, ids):
    """``gpu_decay.gradients`` by XLA, for any number of heads and for log decays ``a [B, T, H]``."""
    batch, tokens, heads = dt.shape
    source = out["source"]
    x_v, x_v_state = source[:, :, :, 0], source[:, :, :, 1]
    net = _spans(out["target"] - x_v)
    net += jnp.pad(out["cross"][:, :, None], ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))
    end = _spans(x_v_state).sum((2, 4)) + out["state"].sum(-1)

    def by_token(v):
        return v.reshape(batch, -1, heads)[:, :tokens]

    log_decay = by_token(_decay_grads(net, end))
    d_dt = by_token(x_v.swapaxes(2, 3)) / jnp.maximum(dt, gpu_decay.SMALLEST_DT)
    if a.ndim == 1:
        d_dt += a[None, None] * log_decay
        d_a = (_real_dt(dt, ids) * log_decay).sum((0, 1))
    else:
        d_a = _real_dt(log_decay, ids)
    d_dt = _real_dt(d_dt, ids)
    return d_dt, d_a, (source[:, :, :, 2].sum((0, 1, 3)) if source.shape[3] == 3 else None)


def _core_bwd(with_final, turns, residuals, cotangents):
    x, dt, a, b_mat, c_mat, d, ids, init, states, ab, real, given, left = residuals
    dy, d_final = cotangents
    cfg = _config(x, b_mat, d, ids)
    batch, heads = cfg.batch, cfg.heads
    back = dataclasses.replace(cfg, reverse=True, emit_states=True, emit_final=init is not None, has_d=False)
    _, d_init, r_states = run_walk(back, dy, ab, c_mat, None, real, None, d_final)
    splits = choose_splits(batch * cfg.groups * cfg.chunks, heads // cfg.groups)
    grads = Grads(
        batch,
        heads,
        cfg.groups,
        cfg.state,
        cfg.chunks,
        platform.multiprocessors(),
        splits,
        cfg.segments,
        cfg.has_d,
        wide=given.dtype != b_mat.dtype,
        alone=0 if turns is None else turns.alone,
    )
    out = gpu_grads.grads(grads, x, dy, ab, b_mat, c_mat, states, r_states, real, _skip_rows(d))

    if init is not None:
        rows, state = _rounded_start(init, dy, c_mat, ab, ids, r_states)
        out["target"] = gpu_grads.add_to_first(out["target"], rows, axis=1)
        out["state"] = out["state"].at[:, 0, :, 0].add(state)
    if a.ndim == 1 and heads % gpu_decay.HEADS == 0:
        sums = (out["source"], out["target"], out["cross"], out["state"])
        d_dt, d_a, d_d = gpu_decay.gradients(*sums, dt, a, ids, cfg.has_d)
    else:
        d_dt, d_a, d_d = _dt_grads(out, dt, a, ids)
    if d is not None:
        if d.ndim == 2:
            d_d = _cleared(dy.astype(F32) * x.astype(F32), ids).sum((0, 1))
        d_d = d_d.astype(d.dtype)
    d_b = _joined(out["d_b"], cfg.tokens).astype(given.dtype)
    d_c = _joined(out["d_c"], cfg.tokens, out["d_c_cross"]).astype(given.dtype)
    d_turn = None
    if turns is not None:
        maps = ((_cleared(b_mat, ids), d_b), (_cleared(c_mat, ids), d_c))
        ends = [None if state is None else (state, grad) for state, grad in ((init, d_init), (left, d_final))]
        d_turn = turn_gradients(turns, maps, (states[:, 1:], r_states[:, :-1]), *ends, ids)
    return out["dx"], d_dt.astype(dt.dtype), d_a.astype(a.dtype), d_b, d_c, d_d, None, d_init, d_turn


_core.defvjp(_core_fwd, _core_bwd)


def ssd_gpu(
    x,
    dt,
    A,
    B,
    C,
    *,
    D=None,
    decay=None,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
    states=None,
    turn=None,
    turns=None,
):
    """The scan of ``pallas_kernels.ssd`` (its shapes and contract) by the Hopper kernels; ``chunk`` is ignored.

    Padding may hold anything. Any head width is cut or padded into heads of 64, any state size padded to a multiple
    of 64. B and C may be float32, so that their gradients are not rounded; their products are of bfloat16.

    For `mamba3`: with ``turns`` tokens read nothing of themselves (see ``Turns.alone``), and the zeros ``turn [B, T, G,
    turns.count]``, by which B and C of a token and of all behind it are turned, have a gradient.
    """
    del chunk
    batch, tokens, heads, width = x.shape
    state = B.shape[-1]
    fit = _Fit.of(x, state)
    x, (b_mat, c_mat), dt, A, ids = fit.arrays(x, (B, C), dt, A, decay, segment_ids)
    init = None
    if initial_state is not None:
        ends = ((0, 0), (0, 0), (0, fit.pad_p), (0, fit.pad_n))
        init = jnp.pad(initial_state.astype(F32), ends).reshape(batch, heads * fit.cuts, TILE, -1)
    if D is not None:
        D = fit.split(D, 0) if D.ndim == 1 else jnp.pad(D, ((0, 0), (0, fit.pad_p))).reshape(heads * fit.cuts, TILE)
    turn = None if turn is None else jnp.pad(turn, ((0, 0), (0, fit.pad_t), (0, 0), (0, 0)))
    core = jax.checkpoint(_core, static_argnums=(9, 10)) if states == "recompute" else _core
    y, final = core(x, dt, A, b_mat, c_mat, D, ids, init, turn, return_final_state, turns)
    y = y.reshape(batch, x.shape[1], heads, fit.cuts * TILE)[:, :tokens, :, :width]
    if not return_final_state:
        return y
    return y, final.reshape(batch, heads, fit.cuts * TILE, -1)[:, :, :width, :state]


def ends(v, dt, A, maps, decay, segment_ids, *, reverse=False):
    """``ops.ssd.context._ends``, by one walk: ``([B, H], [B, H, P, N])``, float32."""
    batch, _, heads, width = v.shape
    state = maps.shape[-1]
    fit = _Fit.of(v, state)
    v, (maps,), dt, A, ids = fit.arrays(v, (maps.astype(v.dtype),), dt, A, decay, segment_ids)
    cfg = dataclasses.replace(_config(v, maps, None, ids), reverse=reverse, has_init=False)
    pieces = choose_pieces(cfg.batch * cfg.heads // cfg.block_heads, cfg.chunks)
    ab, real = _decays(cfg, dt, A, ids)
    cfg = dataclasses.replace(cfg, pieces=pieces)
    [local] = gpu_walk.walk(cfg, v, ab, maps, None, real, None, None)
    _, final = _through(local, ab, None, reverse, 0, cfg.piece_chunks)
    total = jnp.exp2(ab[:, :, :: fit.cuts, 0, -1].sum(1))
    return total, final.reshape(batch, heads, fit.cuts * TILE, -1)[:, :, :width, :state]


@dataclasses.dataclass(frozen=True)
class _Fit:
    """How arrays are cut and padded to what the kernels take."""

    cuts: int  # heads of 64 that a head is cut into
    pad_p: int
    pad_n: int
    pad_t: int

    @staticmethod
    def of(x, state):
        tokens, _, width = x.shape[1:]
        cuts = -(-width // TILE)
        pad_n = 4 * TILE - state if state > 2 * TILE else _round_up(state, TILE) - state
        return _Fit(cuts, cuts * TILE - width, pad_n, -tokens % TOKEN_MULTIPLE)

    def split(self, v, axis):
        return jnp.repeat(v, self.cuts, axis=axis) if self.cuts > 1 else v

    def arrays(self, x, maps, dt, A, decay, segment_ids):
        """The arguments of an ssd, with log decays in the place of A where they are given."""

        def pad(v, *ends):
            return jnp.pad(v, [(0, end) for end in ends]) if any(ends) else v

        batch, tokens, heads, _ = x.shape
        x = pad(x, 0, self.pad_t, 0, self.pad_p).reshape(batch, tokens + self.pad_t, heads * self.cuts, TILE)
        maps = tuple(pad(v, 0, self.pad_t, 0, self.pad_n) for v in maps)
        ids = None if segment_ids is None else pad(segment_ids, 0, self.pad_t)
        dt = self.split(pad(dt, 0, self.pad_t, 0), 2)
        A = self.split(A, 0) if decay is None else self.split(pad(decay.astype(F32), 0, self.pad_t, 0), 2)
        return x, maps, dt, A, ids
