# SPDX-License-Identifier: Apache-2.0
"""`mamba3` on Hopper GPUs: the recurrence of `ssd`, by its kernels.

Behind a token its product of value and key weighs `now + later`, which is what ssd's dt weighs inputs with; at the
token itself it weighs `now`, so `later` times that product is taken off. Keys and queries, biased and turned, are of
each head; states are ssd's own.

With rank R a token is R tokens of ssd, of which the first decays. What each of them reads of those of its own token is
wrong likewise, and mended with it.
"""

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
    tokens = (q_BTRGN, k_BTRGN, v_BTHP, adt_BTH, dt_BTH, trap_BTH, angles_BTHS, z)
    states = [more.pop(name) for name in STATES]
    dtype = accumulation_dtype(tokens)
    if states[0] is None:
        states = empty_states(q_BTRGN, k_BTRGN, v_BTHP, angles_BTHS)
    ids_BT = jnp.ones_like(adt_BTH[:, :, 0], jnp.int32) if segment_ids is None else segment_ids
    clear = lambda array: None if array is None else tokens_where(ids_BT != 0, array.astype(dtype))
    tokens, states = tuple(map(clear, tokens)), tuple(state.astype(dtype) for state in states)
    document_BT = document_numbers(ids_BT)
    marks = Marks(ids_BT != 0, document_BT, jnp.pad(document_BT[:, :-1], ((0, 0), (1, 0))))
    written = prepare(tokens, states, marks, q_bias=q_bias, k_bias=k_bias, mimo_v=mimo_v, rotary_pairs=rotary_pairs)
    y_BTHRP, state_BHPN = _read(written, tokens[3], segment_ids, v_BTHP.dtype)
    if D is not None:
        y_BTHRP += D.astype(dtype)[None, None, :, None, None] * written.v_BTHRP
    y_BTHP = tokens_where(ids_BT != 0, parts.output(y_BTHRP, tokens[7], **more)).astype(v_BTHP.dtype)
    angle_BHS, k_BHRN, v_BHRP = written.last
    return (y_BTHP, angle_BHS, state_BHPN, k_BHRN, v_BHRP) if return_final_state else y_BTHP


def _read(written: Written, adt_BTH, segment_ids, narrow):
    """(y of each rank, leaving state) of what is written, its products of operands of the dtype `narrow`."""
    q, k, v = (array.astype(narrow) for array in (written.q_BTHRN, written.k_BTHRN, written.v_BTHRP))
    n_batch, n_tokens, n_heads, n_rank, _ = q.shape
    flat = lambda array: array.swapaxes(2, 3).reshape(n_batch, n_tokens * n_rank, n_heads, -1)
    by_rank = lambda array: jnp.repeat(array, n_rank, axis=1)
    weight_BTH = written.now_BTH + written.later_BTH
    decay_BTRH = jnp.pad(adt_BTH[:, :, None], ((0, 0), (0, 0), (0, n_rank - 1), (0, 0)))
    y_BTHP, state_BHPN = ssd(
        flat(v),
        by_rank(weight_BTH),
        None,
        flat(k),
        flat(q),
        decay=decay_BTRH.reshape(n_batch, -1, n_heads),
        segment_ids=None if segment_ids is None else by_rank(segment_ids),
        initial_state=written.state_BHNP.swapaxes(-1, -2),
        return_final_state=True,
        implementation="gpu",
    )
    dtype = weight_BTH.dtype
    q, k, v = (array.astype(dtype) for array in (q, k, v))
    is_read = jnp.tril(jnp.ones((n_rank, n_rank), dtype))
    missing = written.now_BTH[..., None, None] - jnp.multiply.outer(weight_BTH, is_read)
    # Sums over few or no elements, which XLA does as it reads them; as products they would be matrices of one row.
    own = (q[..., :, None, :] * k[..., None, :, :]).sum(-1) * missing
    own = (own[..., None] * v[..., None, :, :]).sum(-2)
    return y_BTHP.reshape(n_batch, n_tokens, n_rank, n_heads, -1).swapaxes(2, 3).astype(dtype) + own, state_BHPN
