# SPDX-License-Identifier: Apache-2.0
"""`gated_delta_rule` on Hopper GPUs: what the kernels serve, preparation, custom gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import LOG2E, TILE
from pallas_kernels.ops.gated_delta_rule.gpu import backward, channel_chunks, channel_gradients, channel_walk, forward
from pallas_kernels.ops.gated_delta_rule.gpu.forward import FORGOTTEN, HEADS, Walk
from pallas_kernels.segments import document_starts

WIDEST = 128  # key channels, and value channels of a thread block
TOKEN_MULTIPLE = 8  # of the arrays' tokens: what the copy engine's tiles ask for


def supports(q, k, v, beta, g=None, *, scale=1.0, **options) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    del beta, g, options
    for name, array in (("q_BTGN", q), ("k_BTGN", k), ("v_BTHP", v)):
        if array.dtype != jnp.bfloat16:
            return f"dtype of {name} ({array.dtype}) is not bfloat16"
    if k.shape[-1] > WIDEST:
        return f"key width of k_BTGN ({k.shape[-1]}) above {WIDEST}"
    if isinstance(scale, jax.core.Tracer):
        return "scale is traced, the kernels take a number"
    return None


def gated_delta_rule_gpu(
    q_BTGN,
    k_BTGN,
    v_BTHP,
    beta_BTH,
    g,
    *,
    normalize,
    scale,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
    exact=False,
):
    """See `pallas_kernels.gated_delta_rule`; `chunk` is a hint not followed. Padding may hold anything.

    Keys are padded to 64 or 128 channels, values to a multiple of 64 and, above 128, cut into heads of 128. For `exact`
    see `Walk`; unless decays are by channel, shared memory has room for heads of 64 alone then.
    """
    del chunk
    (n_batch, n_tokens, n_heads, width), key = v_BTHP.shape, k_BTGN.shape[-1]
    by_channel = g is not None and g.ndim == 4
    pad_t = -n_tokens % (TILE if by_channel else TOKEN_MULTIPLE)
    widest = TILE if exact and not by_channel else WIDEST
    pad_n, pad_p = -key % TILE, -width % (TILE if width <= TILE else widest)
    cuts = max(1, (width + pad_p) // widest)

    def pad(array, *ends):
        return jnp.pad(array, [(0, end) for end in ends]) if any(ends) else array

    q, k = (pad(array, 0, pad_t, 0, pad_n) for array in (q_BTGN, k_BTGN))
    v = pad(v_BTHP, 0, pad_t, 0, pad_p).reshape(n_batch, n_tokens + pad_t, n_heads * cuts, -1)
    init = None
    if initial_state is not None:
        init = pad(initial_state.astype(jnp.float32), 0, 0, pad_n, pad_p).swapaxes(2, 3)
        init = init.reshape(n_batch, n_heads * cuts, -1, key + pad_n)
    options = (bool(normalize), float(scale), return_final_state, exact)
    real = None if segment_ids is None else _marks(segment_ids)
    g, beta = (None if gate is None else gate.astype(jnp.float32) for gate in (g, beta_BTH))
    g, beta = (gate if gate is None or cuts == 1 else jnp.repeat(gate, cuts, axis=2) for gate in (g, beta))
    if by_channel:
        beta = jnp.where(segment_ids[..., None] != 0, beta, 0.0) if segment_ids is not None else beta
        y, final = _core_by_channel(q, k, v, pad(g, 0, pad_t, 0, pad_n), _chunked(beta), real, init, options)
    else:
        pad_h = -n_heads * cuts % HEADS
        g, beta = (gate if gate is None else pad(gate, 0, pad_t, pad_h) for gate in (g, beta))
        y, final = _core(q, k, v, g, beta, real, init, options)
    y = y.reshape(n_batch, n_tokens + pad_t, n_heads, -1)[:, :n_tokens, :, :width]
    if not return_final_state:
        return y
    final = final.reshape(n_batch, n_heads, -1, key + pad_n).swapaxes(2, 3)
    return y, final[:, :, :key, :width]


def _marks(segment_ids):
    """What the ids tell of each token, float32 ``[B, chunks, 64]``: see `forward.clear_padding` and `documented`.

    Padding is told as 0, real tokens as 1, those of a chunk without padding as 2, and what begins a document behind
    another as the negative of that.
    """
    real, first = (
        _chunked(mark.astype(jnp.float32)[..., None])[:, :, 0]
        for mark in (segment_ids != 0, document_starts(segment_ids))
    )
    return jnp.where(real.all(-1, keepdims=True), 2.0, real) * (1.0 - 2.0 * first)


def _chunked(array):
    """[B, T, H] -> [B, chunks, H, 64], zeros behind T."""
    n_batch, n_tokens, n_heads = array.shape
    array = jnp.pad(array, ((0, 0), (0, -n_tokens % TILE), (0, 0)))
    return array.reshape(n_batch, -1, TILE, n_heads).swapaxes(2, 3)


def _unchunked(array, n_tokens: int):
    """The inverse of `_chunked`."""
    return array.swapaxes(2, 3).reshape(array.shape[0], -1, array.shape[2])[:, :n_tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _core(q, k, v, g, beta, real, init, options):
    """y and the final state ``[B, H, P, N]`` (None unless asked for) for widths the kernels take.

    N 64 or 128, P 64 or 128, T a multiple of 8; g (or None) and beta ``[B, T, H]``, H filled up to a multiple of HEADS.
    """
    out = forward.walk(_config(q, v, g, real, init, options), q, k, v, g, beta, real, init)
    return out["y"], out.get("final")


def _config(q, v, g, real, init, options):
    """Of arrays as in `_core`."""
    normalize, scale, with_final, exact = options
    return Walk(
        *v.shape[:3],
        *q.shape[2:],
        v.shape[3],
        -(-v.shape[1] // TILE),
        normalize,
        scale,
        decays=g is not None,
        segments=real is not None,
        has_init=init is not None,
        emit_final=with_final,
        exact=exact,
    )


def _core_fwd(q, k, v, g, beta, real, init, options):
    cfg = dataclasses.replace(_config(q, v, g, real, init, options), emit_residuals=True)
    out = forward.walk(cfg, q, k, v, g, beta, real, init)
    names = ["written", "states", "a", "t", "numbers"] + ["t_rest"] * cfg.exact
    kept = {name: out[name] for name in names}
    return (out["y"], out.get("final")), (q, k, v, g, real, init, kept)


def _core_bwd(options, residuals, cotangents):
    q, k, v, g, real, init, kept = residuals
    dy, d_final = cotangents
    cfg = _config(q, v, g, real, init, options)
    dq, dk, dv, d_gates, d_init = backward.gradients(cfg, q, k, real, kept, dy, d_final)
    d_steps, d_beta = d_gates[:, :, :, 0] * LOG2E, d_gates[:, :, :, 1]
    if real is not None:
        mark = real[:, :, None]
        d_steps, d_beta = jnp.where(mark > 0.0, d_steps, 0.0), jnp.where(mark == 0.0, 0.0, d_beta)
    pad_h = -v.shape[2] % HEADS
    d_steps, d_beta = (
        jnp.pad(_unchunked(array, v.shape[1]), ((0, 0), (0, 0), (0, pad_h))) for array in (d_steps, d_beta)
    )
    d_g = None if g is None else jnp.where(g * LOG2E > FORGOTTEN, d_steps, 0.0)
    return dq, dk, dv, d_g, d_beta, None, d_init


_core.defvjp(_core_fwd, _core_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _core_by_channel(q, k, v, g, beta, real, init, options):
    """As `_core` with g ``[B, T, H, N]``, beta and marks by chunk, and T a multiple of 64."""
    cfg = _config(q, v, g, real, init, options)
    return _walk_by_channel(cfg, q, k, v, g, beta, real, init)[:2]


def _walk_by_channel(cfg, q, k, v, g, beta, real, init):
    """(y, final state, what the chunks gave, what the walk gave)."""
    made = channel_chunks.chunks(cfg, q, k, g, beta, real)
    arrays = {**made, "v": v, "beta": beta, "real": real, "init": init}
    steps = channel_walk.Steps(cfg)
    out = channel_walk.walk(steps, {name: arrays[name] for name in steps.inputs})
    return out["y"], out.get("end"), made, out


def _core_by_channel_fwd(q, k, v, g, beta, real, init, options):
    cfg = dataclasses.replace(_config(q, v, g, real, init, options), emit_residuals=True)
    y, final, made, out = _walk_by_channel(cfg, q, k, v, g, beta, real, init)
    kept = {**made, "u": out["written"], "state": out["states"]}
    return (y, final), (q, k, v, g, beta, real, init, kept)


def _core_by_channel_bwd(options, residuals, cotangents):
    q, k, v, g, beta, real, init, kept = residuals
    dy, d_final = cotangents
    cfg = _config(q, v, g, real, init, options)
    arrays = {**kept, "q": q, "k": k, "g": g, "beta": beta, "real": real, "dy": dy, "final": d_final}
    steps = channel_walk.Steps(cfg, reverse=True, has_final=d_final is not None)
    back = channel_walk.walk(steps, {name: arrays[name] for name in steps.inputs})
    arrays |= {"dv": back["dv"], "grad": back["grads"]}
    out = channel_gradients.gradients(cfg, arrays)
    dq, dk = (backward.of_groups(out[name], cfg.groups) for name in ("dq", "dk"))
    return dq, dk, back["dv"], out["dg"], out["dbeta"], None, back.get("end")


_core_by_channel.defvjp(_core_by_channel_fwd, _core_by_channel_bwd)
