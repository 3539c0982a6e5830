# SPDX-License-Identifier: Apache-2.0
"""`linear_attention` on Hopper GPUs with one decay a head: the recurrence of `ssd`, by its kernels.

Values are the inputs of ssd, keys and queries its B and C, and dt, which weighs inputs, is the scale: so it is not
rounded into bfloat16 queries. The states are those of ssd transposed, without the scale.
"""

import jax.numpy as jnp

from pallas_kernels.op import limit
from pallas_kernels.ops.ssd import OP as SSD
from pallas_kernels.ops.ssd.api import ssd

_STANDARD = {"bonus": None, "normalizer": False, "feature_map": None}


def supports(q, k, v, g=None, **options) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    for name, standard in _STANDARD.items():
        if options.get(name, standard) is not standard:
            return f"{name}: the kernels know no other than {standard}"
    if g is not None and g.ndim == 4:
        return f"g has shape {list(g.shape)}, the kernels decay by head, not by key channel"
    return limit(SSD, "gpu", (v, None, None, k, q), {})


def linear_attention_gpu(
    q, k, v, g, *, scale, segment_ids=None, initial_state=None, return_final_state=False, chunk=None, **standard
):
    """See `pallas_kernels.linear_attention`; `chunk` is a hint not followed."""
    del chunk, standard
    decay = jnp.zeros(v.shape[:3], jnp.float32) if g is None else jnp.broadcast_to(g, v.shape[:3])
    out = ssd(
        v,
        jnp.full_like(decay, scale),
        None,
        k,
        q,
        decay=decay,
        segment_ids=segment_ids,
        initial_state=None if initial_state is None else scale * jnp.swapaxes(initial_state, -1, -2),
        return_final_state=return_final_state,
        implementation="gpu",
    )
    return (out[0], jnp.swapaxes(out[1], -1, -2) / scale) if return_final_state else out
