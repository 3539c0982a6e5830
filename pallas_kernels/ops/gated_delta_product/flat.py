# SPDX-License-Identifier: Apache-2.0
"""`gated_delta_product` as `gated_delta_rule` on R times the tokens: decay at a token's first, read at its last.

A token has no decay and no query at its other updates. So many updates that hardly decay ask the Hopper kernels for
more than bfloat16: there they are `exact`.
"""

import functools

import jax.numpy as jnp

from pallas_kernels.op import call, limit
from pallas_kernels.ops.gated_delta_rule import OP as DELTA_RULE


def by_delta_rule(
    implementation,
    q_BTGN,
    k_BTRGN,
    v_BTRHP,
    beta_BTRH,
    g,
    *,
    segment_ids=None,
    return_final_state=False,
    **options,
):
    """See `pallas_kernels.gated_delta_product`; by an implementation of `gated_delta_rule`."""
    n_batch, n_tokens, n_updates = v_BTRHP.shape[:3]

    def flat(array_BTR):
        return array_BTR.reshape(n_batch, n_tokens * n_updates, *array_BTR.shape[3:])

    def spread(array_BT, place: int):
        """At one of a token's updates, zeros at the others."""
        around = ((0, 0), (0, 0), (place, n_updates - 1 - place), *((0, 0) for _ in array_BT.shape[2:]))
        return flat(jnp.pad(array_BT[:, :, None], around))

    args = (spread(q_BTGN, n_updates - 1), flat(k_BTRGN), flat(v_BTRHP), flat(beta_BTRH))
    options |= {
        "segment_ids": None if segment_ids is None else jnp.repeat(segment_ids, n_updates, axis=1),
        "return_final_state": True,
    }
    args = (*args, None if g is None else spread(g, 0))
    y, final_state_BHNP = call(DELTA_RULE, implementation, args, options, offered={"exact": True})
    y_BTHP = y.reshape(n_batch, n_tokens, n_updates, *y.shape[2:])[:, :, -1]
    return (y_BTHP, final_state_BHNP) if return_final_state else y_BTHP


gated_delta_product_xla = functools.partial(by_delta_rule, "xla")
gated_delta_product_gpu = functools.partial(by_delta_rule, "gpu")


def supports_gpu(q, k, v, beta=None, g=None, **options) -> str | None:
    """Why the Hopper kernels of `gated_delta_rule` cannot serve this call, or None if they can."""
    return limit(DELTA_RULE, "gpu", (q, k, v, beta, g), {"scale": options.get("scale", 1.0)})  # of types and key width
