# SPDX-License-Identifier: Apache-2.0
"""`mamba3` with one input and output a head on Hopper GPUs: the recurrence of `ssd`, by its kernels.

Behind a token its product of value and key weighs `now + later`, which is what ssd's dt weighs inputs with; at the
token itself it weighs `now`, so `later` times that product is taken off. Keys and queries, biased and turned, are of
each head; states are ssd's own.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.by_token import tokens_where
from pallas_kernels.chunks import Marks
from pallas_kernels.op import limit
from pallas_kernels.ops.mamba3 import parts
from pallas_kernels.ops.mamba3.reference import STATES, accumulation_dtype, empty_states
from pallas_kernels.ops.mamba3.xla import prepare
from pallas_kernels.ops.ssd import OP as SSD
from pallas_kernels.ops.ssd.api import ssd
from pallas_kernels.segments import document_numbers


def supports(q, k, v, *tokens, mimo_v=None, **options) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    del q, tokens, options
    if mimo_v is not None:
        return "mimo_v: the kernels take one input and output a head"
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
    q_BTHN, k_BTHN, v_BTHP = (array[:, :, :, 0] for array in (written.q_BTHRN, written.k_BTHRN, written.v_BTHRP))
    narrow = lambda array: array.astype(jnp.bfloat16)
    y_BTHP, state_BHPN = ssd(
        narrow(v_BTHP),
        written.now_BTH + written.later_BTH,
        None,
        narrow(k_BTHN),
        narrow(q_BTHN),
        decay=tokens[3],
        segment_ids=segment_ids,
        initial_state=written.state_BHNP.swapaxes(-1, -2),
        return_final_state=True,
        implementation="gpu",
    )
    own_BTH = jnp.sum(q_BTHN * k_BTHN, axis=-1) * -written.later_BTH
    own_BTH = own_BTH if D is None else own_BTH + D.astype(dtype)[None, None]
    y_BTHRP = (y_BTHP.astype(dtype) + own_BTH[..., None] * v_BTHP)[:, :, :, None]
    y_BTHP = tokens_where(ids_BT != 0, parts.output(y_BTHRP, tokens[7], **more)).astype(jnp.bfloat16)
    angle_BHS, k_BHRN, v_BHRP = written.last
    return (y_BTHP, angle_BHS, state_BHPN, k_BHRN, v_BHRP) if return_final_state else y_BTHP
