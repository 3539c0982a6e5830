# SPDX-License-Identifier: Apache-2.0
"""`mamba3` on Hopper GPUs: the recurrence of `ssd`, by its kernels.

Behind a token its product of value and key weighs `now + later`, which is what ssd's dt weighs inputs with; at the
token itself it weighs `now`, so `later` times that product is taken off. Keys and queries, biased and turned, are of
each head; states are ssd's own.

With rank R a token is R tokens of ssd, of which the first decays. What each of them reads of those of its own token is
wrong likewise, and mended with it. What stands around the kernels is computed again for its gradient, so that nothing
of it is kept in float32.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.by_token import tokens_where
from pallas_kernels.chunks import Marks
from pallas_kernels.op import limit
from pallas_kernels.ops.mamba3 import parts
from pallas_kernels.ops.mamba3.reference import STATES, accumulation_dtype, empty_states
from pallas_kernels.ops.mamba3.xla import Written, prepare
from pallas_kernels.ops.ssd import OP as SSD
from pallas_kernels.ops.ssd.api import ssd
from pallas_kernels.segments import document_numbers


def supports(q, k, v, *tokens, **options) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    del q, tokens, options
    maps = jax.ShapeDtypeStruct((*v.shape[:3], k.shape[-1]), v.dtype)
    return limit(SSD, "gpu", (v, None, None, maps, maps), {})


def mamba3_gpu(q_BTRGN, k_BTRGN, v_BTHP, adt_BTH, dt_BTH, trap_BTH, angles_BTHS, *, z, segment_ids=None,
               return_final_state=False, chunk=None, q_bias, k_bias, D, mimo_v, rotary_pairs, **more):  # fmt: skip
    """See `pallas_kernels.mamba3`; `chunk` is a hint not followed."""
    del chunk
    tokens = (q_BTRGN, k_BTRGN, v_BTHP, adt_BTH, dt_BTH, trap_BTH, angles_BTHS)
    states = [more.pop(name) for name in STATES]
    if states[0] is None:
        states = empty_states(q_BTRGN, k_BTRGN, v_BTHP, angles_BTHS)
    ids_BT = jnp.ones_like(adt_BTH[:, :, 0], jnp.int32) if segment_ids is None else segment_ids
    prepared = jax.checkpoint(functools.partial(_prepared, rotary_pairs=rotary_pairs, dtype=accumulation_dtype(tokens)))
    written, own = prepared(tokens, tuple(states), {"q_bias": q_bias, "k_bias": k_bias, "mimo_v": mimo_v}, ids_BT)
    y_BTHP, state_BHPN = _scan(written, tokens_where(ids_BT != 0, adt_BTH), segment_ids)
    finished = jax.checkpoint(functools.partial(_finished, norm_eps=more.pop("norm_eps")))
    y_BTHP = finished(y_BTHP, own, written.v_BTHRP, z, {"D": D, **more}, ids_BT)
    angle_BHS, k_BHRN, v_BHRP = written.last
    return (y_BTHP, angle_BHS, state_BHPN, k_BHRN, v_BHRP) if return_final_state else y_BTHP


def _prepared(tokens, states, weights, ids_BT, *, rotary_pairs, dtype):
    """(see `prepare`, in `dtype`, values in theirs; what a token lacks of its own values [B, T, H, R, R])."""
    narrow = tokens[2].dtype
    tokens = tuple(tokens_where(ids_BT != 0, array.astype(dtype)) for array in tokens)
    document_BT = document_numbers(ids_BT)
    marks = Marks(ids_BT != 0, document_BT, jnp.pad(document_BT[:, :-1], ((0, 0), (1, 0))))
    written = prepare((*tokens, None), tuple(state.astype(dtype) for state in states), marks, **weights,
                      rotary_pairs=rotary_pairs, narrow=narrow)  # fmt: skip
    q, k = written[:2]
    n_rank = q.shape[3]
    is_read = jnp.tril(jnp.ones((n_rank, n_rank), dtype))
    missing = jnp.multiply.outer(written.now_BTH, 1 - is_read) - jnp.multiply.outer(written.later_BTH, is_read)
    # A sum that XLA takes as it reads; as a product it would be matrices of few rows or one.
    own = (q[..., :, None, :] * k[..., None, :, :]).sum(-1) * missing
    return written._replace(v_BTHRP=written.v_BTHRP.astype(narrow)), own


def _scan(written: Written, adt_BTH, segment_ids):
    """(y of ssd's tokens, leaving state)."""
    n_batch, n_tokens, n_heads, n_rank, _ = written.q_BTHRN.shape
    flat = lambda array: array.swapaxes(2, 3).reshape(n_batch, n_tokens * n_rank, n_heads, -1)
    by_rank = lambda array: jnp.repeat(array, n_rank, axis=1)
    decay_BTRH = jnp.pad(adt_BTH[:, :, None], ((0, 0), (0, 0), (0, n_rank - 1), (0, 0)))
    return ssd(
        flat(written.v_BTHRP),
        by_rank(written.now_BTH + written.later_BTH),
        None,
        flat(written.k_BTHRN),
        flat(written.q_BTHRN),
        decay=decay_BTRH.reshape(n_batch, -1, n_heads),
        segment_ids=None if segment_ids is None else by_rank(segment_ids),
        initial_state=written.state_BHNP.swapaxes(-1, -2),
        return_final_state=True,
        implementation="gpu",
    )


def _finished(y_BTHP, own, v_BTHRP, z, weights, ids_BT, *, norm_eps):
    """y of ssd's tokens with what they read of their own token put right, then as `parts.output`."""
    D, narrow, dtype = weights["D"], y_BTHP.dtype, own.dtype
    v = v_BTHRP.astype(dtype)
    y_BTHRP = y_BTHP.reshape(*v.shape[:2], v.shape[3], v.shape[2], -1).swapaxes(2, 3).astype(dtype)
    y_BTHRP += (own[..., None] * v[..., None, :, :]).sum(-2)
    if D is not None:
        y_BTHRP += D.astype(dtype)[None, None, :, None, None] * v
    z = None if z is None else tokens_where(ids_BT != 0, z.astype(dtype))
    rest = {name: weights[name] for name in ("norm_weight", "mimo_z", "mimo_o")}
    y_BTHP = parts.output(y_BTHRP, z, **rest, norm_eps=norm_eps)
    return tokens_where(ids_BT != 0, y_BTHP).astype(narrow)
