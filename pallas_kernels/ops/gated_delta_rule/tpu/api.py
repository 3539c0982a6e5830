# SPDX-License-Identifier: Apache-2.0
"""`gated_delta_rule` on TPUs: what the kernels serve, blocks, layouts and the custom gradient.

What padding holds, lengths of q and k and the gates are plain JAX around the kernels, gradients included.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.by_token import tokens_where
from pallas_kernels.mosaic_tpu import F32, LANES
from pallas_kernels.ops.gated_delta_rule.tpu import kernels
from pallas_kernels.ops.gated_delta_rule.tpu.chunk import Blocks
from pallas_kernels.ops.gated_delta_rule.tpu.products import CHUNK
from pallas_kernels.segments import document_starts

DTYPES = (jnp.bfloat16, jnp.float32)
WIDEST = 256  # key and value channels
BLOCK_HEADS = 4  # the most heads of one block: they fill each other's latencies; more were not tried
FORGOTTEN = -120.0  # log decay of a token below which nothing is left: exp of it is zero in float32
BETWEEN_DOCUMENTS = -1e9  # that of a document's first token
OPERANDS = ("q", "k", "v", "gates", "steps")  # of the kernels, steps where decays are of channels
LENGTH_EPS = 1e-6  # below a root


def supports(q, k, v, beta, g=None, *, scale=1.0, **options) -> str | None:
    """Why the TPU kernels cannot serve this call of `gated_delta_rule`, or None if they can."""
    del options
    if v.dtype not in DTYPES:
        return f"dtype of v_BTHP ({v.dtype}) is neither bfloat16 nor float32"
    for name, array in (("q_BTGN", q), ("k_BTGN", k)):
        if array.dtype != v.dtype:
            return f"dtype of {name} ({array.dtype}) is not that of v_BTHP ({v.dtype})"
    for name, array in (("beta_BTH", beta), ("g", g)):
        if array is not None and array.dtype != F32:
            return f"dtype of {name} ({array.dtype}) is not float32"
    for name, size in (("key width of k_BTGN", k.shape[-1]), ("head width of v_BTHP", v.shape[-1])):
        if size > WIDEST:
            return f"{name} ({size}) above {WIDEST}"
    return "scale is traced, the kernels take a number" if isinstance(scale, jax.core.Tracer) else None


def slower(q, k, v, *_, **__) -> str | None:
    """Why xla is faster at a call that the kernels serve, or None if they are, by the compiler's estimate."""
    del q, k
    if v.shape[1] < CHUNK:
        return f"T ({v.shape[1]}) below {CHUNK}, to which the kernels pad"
    if v.dtype == F32:
        return "dtype of v_BTHP (float32): the kernels' products are exact, those of xla are rounded to bfloat16"
    return None


def gated_delta_rule_tpu(
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
    heads_per_block=None,
    interpret=False,
):
    """See `pallas_kernels.gated_delta_rule`; chunks are 128 tokens, `chunk` is a hint not followed.

    Keys and values are padded to a multiple of 128 channels. heads_per_block: chosen by shape unless given. interpret:
    run the kernels in Pallas' interpreter, on any platform.
    Raises NotImplementedError, naming argument and limit, where `supports` gives a reason, ValueError for blocks of
    heads that neither hold whole groups nor are parts of one.
    """
    del chunk
    if reason := supports(q_BTGN, k_BTGN, v_BTHP, beta_BTH, g, scale=scale):
        raise NotImplementedError(reason)
    (n_batch, n_tokens, n_heads, width), (n_groups, key) = v_BTHP.shape, k_BTGN.shape[2:]
    by_channel = g is not None and g.ndim == 4
    heads = heads_a_block(n_batch, n_heads, n_groups, heads_per_block)
    blocks = Blocks(
        heads=heads,
        groups=max(1, heads * n_groups // n_heads),
        key=key + -key % LANES,
        width=width + -width % LANES,
        dtype=str(v_BTHP.dtype),
        decays=g is not None or segment_ids is not None,
        by_channel=by_channel,
        initial=initial_state is not None,
        final=return_final_state,
    )
    real_BT = None if segment_ids is None else segment_ids != 0

    def real(array):
        """Zero at padded tokens."""
        return array if real_BT is None else tokens_where(real_BT, array)

    def merged(array):
        """Tokens to whole chunks, channels to whole lanes, heads merged."""
        array = jnp.pad(array, ((0, 0), (0, -n_tokens % CHUNK), (0, 0), (0, -array.shape[3] % LANES)))
        return array.reshape(*array.shape[:2], -1)

    q, k, v = (real(array) for array in (q_BTGN, k_BTGN, v_BTHP))
    shares = _shares(q, k, real(beta_BTH), normalize, scale)
    steps = None if g is None else _steps(g, segment_ids)
    if steps is None and segment_ids is not None:
        steps = _steps(jnp.zeros_like(beta_BTH), segment_ids)
    gates = _gates([*shares, steps] if blocks.of_heads else shares, blocks)
    initial = None
    if initial_state is not None:
        initial = jnp.pad(initial_state.astype(F32), ((0, 0), (0, 0), (0, -key % LANES), (0, -width % LANES)))
    arrays = (merged(q), merged(k), merged(v), gates, merged(steps) if by_channel else None)
    y, last = _scan((blocks, interpret), *arrays, initial)
    y = y.reshape(n_batch, -1, n_heads, blocks.width)[:, :n_tokens, :, :width]
    y = real(y)
    return (y, last[:, :, :key, :width]) if return_final_state else y


def heads_a_block(n_batch: int, n_heads: int, n_groups: int, wanted: int | None) -> int:
    """Heads of a block: whole groups or a part of one, a block for each core.

    Raises ValueError where `wanted` is not so.
    """
    shared = n_heads // n_groups
    legal = [n for n in range(1, n_heads + 1) if n_heads % n == 0 and (n % shared == 0 or shared % n == 0)]
    if wanted is not None:
        if wanted not in legal:
            raise ValueError(f"heads_per_block ({wanted}) not one of {legal}")
        return wanted
    chip = platform.tpu_chip()
    cores = 1 if chip is None else chip.cores
    most = BLOCK_HEADS if n_batch % cores == 0 else min(BLOCK_HEADS, max(1, n_heads // cores))
    return max(n for n in legal if n <= most)


def _shares(q, k, beta_BTH, normalize: bool, scale: float) -> list:
    """u, r and w of `chunk`, float32 [B, T, H]."""
    if not normalize:
        return [jnp.full_like(beta_BTH, scale), beta_BTH, beta_BTH]

    def of_heads(array):
        """1 / length of each head's."""
        inverse = jax.lax.rsqrt(jnp.sum(array.astype(F32) ** 2, axis=-1) + LENGTH_EPS)
        return jnp.repeat(inverse, beta_BTH.shape[2] // inverse.shape[2], axis=2)

    per_k = of_heads(k)
    return [scale * of_heads(q), beta_BTH * per_k**2, beta_BTH * per_k]


def _steps(g, segment_ids):
    """Log decays: padding has none, a document's first token forgets all."""
    if segment_ids is None:
        return jnp.maximum(g, FORGOTTEN)
    steps = jnp.maximum(tokens_where(segment_ids != 0, g), FORGOTTEN)
    return tokens_where(~document_starts(segment_ids), steps, BETWEEN_DOCUMENTS)


def _gates(arrays: list, blocks: Blocks):
    """float32 [B, head blocks, gate_rows, T] of [B, T, H] each."""

    def by_block(array):
        array = jnp.pad(array, ((0, 0), (0, -array.shape[1] % CHUNK), (0, 0))).swapaxes(1, 2)
        return array.reshape(array.shape[0], -1, blocks.heads, array.shape[2])

    gates = jnp.concatenate([by_block(array) for array in arrays], axis=2)
    return jnp.pad(gates, ((0, 0), (0, 0), (0, blocks.gate_rows - gates.shape[2]), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(static, q, k, v, gates, steps, initial):
    """(y [B, T, H P], last [B, H, N, P] or None) of whole chunks, lanes and blocks."""
    out = _forward(static, q, k, v, gates, steps, initial, keep=False)
    return out["y"], out.get("last")


def _present(arrays: dict) -> dict:
    return {name: array for name, array in arrays.items() if array is not None}


def _forward(static, *arrays, keep: bool) -> dict:
    blocks, interpret = static
    inputs = _present(dict(zip((*OPERANDS, "initial"), arrays, strict=True)))
    return kernels.forward(inputs, blocks, keep=keep, interpret=interpret)


def _forward_rule(static, *arrays):
    out = _forward(static, *arrays, keep=True)
    return (out["y"], out.get("last")), (arrays[:-1], out["states"], out["inverses"])


def _backward_rule(static, residuals, cotangents):
    blocks, interpret = static
    operands, states, inverses = residuals
    q, (dy, dlast) = operands[0], cotangents
    inputs = {**dict(zip(OPERANDS, operands, strict=True)), "states": states, "inverses": inverses, "dy": dy}
    inputs = _present({**inputs, "dlast": dlast if blocks.final else None})
    grads = kernels.backward(inputs, blocks, interpret=interpret)

    def whole(array):
        """Summed over the blocks of heads that share a group."""
        parts = array.reshape(*q.shape[:2], q.shape[2] // blocks.key, -1, blocks.key)
        return parts.sum(axis=3).reshape(q.shape).astype(q.dtype)

    others = (grads.get(f"d{name}") for name in (*OPERANDS[2:], "initial"))
    return whole(grads["dq"]), whole(grads["dk"]), *others


_scan.defvjp(_forward_rule, _backward_rule)
