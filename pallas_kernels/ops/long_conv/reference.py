# SPDX-License-Identifier: Apache-2.0
"""`long_conv` token by token, each the sum over all tokens before it: the oracle (float64 if the inputs are)."""

import jax
import jax.numpy as jnp

from pallas_kernels.by_token import tokens_where
from pallas_kernels.segments import document_numbers
from pallas_kernels.varying import vary_alike


def long_conv_reference(x_BTD, h_SD, *, skip=None, segment_ids=None):
    """See `pallas_kernels.long_conv`."""
    dtype = jnp.result_type(x_BTD, h_SD, jnp.float32)
    ids_BT = jnp.ones(x_BTD.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    x = tokens_where(ids_BT != 0, x_BTD.astype(dtype))
    h = h_SD.astype(dtype)
    place_BT = jnp.cumsum(ids_BT != 0, axis=1)  # padding is not counted
    document_BT = document_numbers(ids_BT)

    def step(_, token):
        x_BD, place_B, document_B, id_B = token
        lag_BT = place_B[:, None] - place_BT
        counts_BT = (lag_BT >= 0) & (lag_BT < h.shape[0]) & (document_BT == document_B[:, None]) & (ids_BT != 0)
        weight_BTD = jnp.where(counts_BT[..., None], h[jnp.clip(lag_BT, 0, h.shape[0] - 1)], 0)
        y_BD = jnp.sum(weight_BTD * x, axis=1)
        y_BD = y_BD if skip is None else y_BD + skip.astype(dtype)[None] * x_BD
        return None, jnp.where(id_B[:, None] != 0, y_BD, 0)

    by_token = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (x, place_BT, document_BT, ids_BT))
    _, y_TBD = jax.lax.scan(step, None, vary_alike(by_token))
    return jnp.moveaxis(y_TBD, 0, 1).astype(x_BTD.dtype)
