# SPDX-License-Identifier: Apache-2.0
"""`mamba3` on Hopper GPUs and TPUs: the recurrence of `ssd`, by its kernels.

Behind a token its product of value and key weighs `now + later`, which is what ssd's dt weighs inputs with; at the
token itself it weighs `now`. So the kernels give what a token reads of those before it, and what it reads of itself is
added to it. Keys and queries, biased and turned, are of each head; states are ssd's own. With rank R a token is R
tokens of ssd, of which the first decays, and which read nothing of each other.

Under a norm little is left of the gradient of whatever scales y, of D above all, and what a token reads of itself
scales its values as D does: so it is of numbers not rounded, as D's term is. Turned together, what tokens read of each
other stays the same: angles have gradients of their own from the kernels, see `pallas_kernels.ops.ssd.turns`, and
what a token reads of itself is of keys and queries not turned.

What stands around the kernels is computed again for its gradient, so that nothing of it is kept in float32.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.by_token import tokens_where
from pallas_kernels.chunks import Marks
from pallas_kernels.op import call, limit
from pallas_kernels.ops.mamba3 import parts
from pallas_kernels.ops.mamba3.reference import STATES, accumulation_dtype, empty_states
from pallas_kernels.ops.mamba3.xla import Written, biased, prepare, valued
from pallas_kernels.ops.ssd import OP as SSD
from pallas_kernels.ops.ssd.turns import Turns
from pallas_kernels.segments import document_numbers

MOST_RANKS = 64  # and its divisors: they lie in one tile of tokens


def why_not(implementation, q, k, v, *tokens, **options) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    del options
    if MOST_RANKS % q.shape[2]:
        return f"ranks of q_BTGN ({q.shape[2]}) not a divisor of {MOST_RANKS}"
    maps = jax.ShapeDtypeStruct((*v.shape[:3], k.shape[-1]), v.dtype)
    return limit(SSD, implementation, (v, tokens[1], None, maps, maps), {})


def by_ssd(implementation, q_BTRGN, k_BTRGN, v_BTHP, adt_BTH, dt_BTH, trap_BTH, angles_BTHS, *, z, segment_ids=None,
           return_final_state=False, chunk=None, q_bias, k_bias, D, mimo_v, rotary_pairs, interpret=False,
           **more):  # fmt: skip
    """See `pallas_kernels.mamba3`; `chunk` is a hint not followed. By an implementation of `ssd`."""
    del chunk
    tokens = (q_BTRGN, k_BTRGN, v_BTHP, adt_BTH, dt_BTH, trap_BTH, angles_BTHS)
    states = [more.pop(name) for name in STATES]
    if states[0] is None:
        states = empty_states(q_BTRGN, k_BTRGN, v_BTHP, angles_BTHS)
    ids_BT = jnp.ones_like(adt_BTH[:, :, 0], jnp.int32) if segment_ids is None else segment_ids
    dtype, weights = accumulation_dtype(tokens), {"q_bias": q_bias, "k_bias": k_bias, "mimo_v": mimo_v}
    written = jax.checkpoint(functools.partial(_prepared, rotary_pairs=rotary_pairs, dtype=dtype))(
        tokens, tuple(states), weights, ids_BT
    )
    decays = tokens_where(ids_BT != 0, adt_BTH)
    y_BTHP, state_BHPN = _scan(implementation, written, decays, segment_ids, rotary_pairs, interpret)
    y_BTHP = jax.checkpoint(functools.partial(_finished, norm_eps=more.pop("norm_eps"), dtype=dtype))(
        y_BTHP, tokens, z, {"D": D, **weights, **more}, ids_BT
    )
    angle_BHS, k_BHRN, v_BHRP = written.last
    return (y_BTHP, angle_BHS, state_BHPN, k_BHRN, v_BHRP) if return_final_state else y_BTHP


mamba3_gpu = functools.partial(by_ssd, "gpu")
mamba3_tpu = parts.in_halves(functools.partial(by_ssd, "tpu"))
supports_gpu = functools.partial(why_not, "gpu")
supports_tpu = functools.partial(why_not, "tpu")


def _prepared(tokens, states, weights, ids_BT, *, rotary_pairs, dtype) -> Written:
    """See `prepare`, in `dtype`; values in theirs."""
    narrow = tokens[2].dtype
    tokens = tuple(tokens_where(ids_BT != 0, array.astype(dtype)) for array in tokens)
    document_BT = document_numbers(ids_BT)
    marks = Marks(ids_BT != 0, document_BT, jnp.pad(document_BT[:, :-1], ((0, 0), (1, 0))))
    states = tuple(state.astype(dtype) for state in states)
    written = prepare((*tokens, None), states, marks, **weights, rotary_pairs=rotary_pairs, narrow=narrow)
    return written._replace(v_BTHRP=written.v_BTHRP.astype(narrow))


def _scan(implementation, written: Written, adt_BTH, segment_ids, rotary_pairs: str, interpret):
    """(y of ssd's tokens, leaving state)."""
    n_batch, n_tokens, n_heads, n_rank, d_key = written.q_BTHRN.shape
    n_angles = written.angle_BTHS.shape[-1]
    columns = (0, 1, 2) if rotary_pairs == "adjacent" else (0, d_key // 2, 1)
    flat = lambda array: array.swapaxes(2, 3).reshape(n_batch, n_tokens * n_rank, n_heads, -1)
    by_rank = lambda array: jnp.repeat(array, n_rank, axis=1)
    decay_BTRH = jnp.pad(adt_BTH[:, :, None], ((0, 0), (0, 0), (0, n_rank - 1), (0, 0)))
    tokens = (written.v_BTHRP, written.k_BTHRN, written.q_BTHRN)
    x_BTHP, B_BTHN, C_BTHN = (flat(array) for array in tokens)
    dt_BTH = by_rank(written.now_BTH + written.later_BTH)
    options = {
        "D": None,
        "decay": decay_BTRH.reshape(n_batch, -1, n_heads),
        "segment_ids": None if segment_ids is None else by_rank(segment_ids),
        "initial_state": written.state_BHNP.swapaxes(-1, -2),
        "return_final_state": True,
        "chunk": None,
        "states": None,
    }
    turn_BTHS = by_rank(written.angle_BTHS - jax.lax.stop_gradient(written.angle_BTHS))
    more = {"turn": turn_BTHS, "turns": Turns(n_angles, *columns, alone=n_rank), "interpret": interpret}
    return call(SSD, implementation, (x_BTHP, dt_BTH, None, B_BTHN, C_BTHN), options, offered=more)


def _finished(y_BTHP, tokens, z, weights, ids_BT, *, norm_eps, dtype):
    """y of ssd's tokens with what they read of their own token, then as `parts.output`."""
    v_dtype = tokens[2].dtype
    tokens = tuple(tokens_where(ids_BT != 0, array.astype(dtype)) for array in tokens)
    q, k, v, _, dt_BTH, trap_BTH, _ = tokens
    n_heads = v.shape[2]
    q, k = (biased(array, weights[name], n_heads) for array, name in ((q, "q_bias"), (k, "k_bias")))
    v = valued(v, weights["mimo_v"])
    y_BTHRP = y_BTHP.reshape(*v.shape[:2], v.shape[3], n_heads, -1).swapaxes(2, 3).astype(dtype)
    # Sums that XLA takes as it reads; as products they would be of matrices of few rows or one.
    own = (q[..., :, None, :] * k[..., None, :, :]).sum(-1) * (jax.nn.sigmoid(trap_BTH) * dt_BTH)[..., None, None]
    y_BTHRP += (own[..., None] * v[..., None, :, :]).sum(-2)
    if weights["D"] is not None:
        y_BTHRP += weights["D"].astype(dtype)[None, None, :, None, None] * v
    z = None if z is None else tokens_where(ids_BT != 0, z.astype(dtype))
    rest = {name: weights[name] for name in ("norm_weight", "mimo_z", "mimo_o")}
    y_BTHP = parts.output(y_BTHRP, z, **rest, norm_eps=norm_eps)
    return tokens_where(ids_BT != 0, y_BTHP).astype(v_dtype)
