# SPDX-License-Identifier: Apache-2.0
"""Sublayers of one token of one row on a GPU: norm and product in one kernel, product and residual stream in another.

A mixer that can be computed so has `extend_row(row, cache, length_B, layer)`, which gives the stream behind it, [1, 1,
D], and its cache; or None where its options ask for more than the kernels compute: then `extend` serves it.

Axis letters: D model, K inputs, N outputs of a product, S shares of the inputs.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import sharding
from hybridlm.layers import params
from hybridlm.layers.norm import RMSNorm
from pallas_kernels import one_token


class Row(NamedTuple):
    """The stream before a sublayer, and what the sublayer does around its mixer."""

    x_BTD: jax.Array
    """[1, 1, D]."""
    norm: RMSNorm
    multiplier: float
    """Of the mixer's output."""

    @property
    def weight_D(self) -> jax.Array:
        """What the norm multiplies by, float32."""
        return self.norm.weight[...].astype(jnp.float32) + self.norm.offset


def served(x: Any, norm: Any, real_BT: Any) -> bool:
    """Whether kernels can serve a sublayer with this stream and norm."""
    if isinstance(x, tuple) or x.shape[:2] not in ((1, 1), (64, 1)) or (x.shape[0] == 64 and not KNOBS["rows"]) or real_BT is not None or sharding.is_split():
        return False
    return isinstance(norm, RMSNorm) and norm.bias is None and one_token.why_not(x.dtype) is None


def takes(*weights: nnx.Param | None, n_in: int = 1) -> bool:
    """Whether kernels take these matrices; n_in: axes that the product adds over."""
    return all(weight is None or _fits(params.operand(weight, jnp.bfloat16), n_in) for weight in weights)


def _fits(value: Any, n_in: int) -> bool:
    if not isinstance(value, jax.Array):  # rounded to eight bits
        return False
    n_inputs = math.prod(value.shape[:n_in])
    return one_token.product_fits(n_inputs, value.size // n_inputs)


KNOBS = {"tile": 16, "ahead": False, "rows": True}


def flat(weight: nnx.Param, width: int) -> jax.Array:
    return params.operand(weight, jnp.bfloat16).reshape(-1, width)


def products(row: Row, *weights: nnx.Param, ahead=None) -> list[jax.Array]:
    """The normed stream times each matrix [D, ...]: [...]."""
    from pallas_kernels.one_token import products as kernels

    values = [params.operand(weight, row.x_BTD.dtype) for weight in weights]
    if row.x_BTD.shape[0] > 1:
        from pallas_kernels.one_token import rows

        flat, parts = [w.reshape(w.shape[0], -1) for w in values], [row.x_BTD[:, 0], row.weight_D]
        sums = rows.products(kernels.NORMED, parts, flat, eps=row.norm.eps)
        return [y.astype(row.x_BTD.dtype).reshape(-1, *w.shape[1:]) for y, w in zip(sums, values, strict=True)]
    flat, parts = [w.reshape(w.shape[0], -1) for w in values], [row.x_BTD.reshape(-1), row.weight_D]
    ahead = ahead if KNOBS["ahead"] else None
    sums = kernels.products(kernels.NORMED, parts, flat, eps=row.norm.eps, ahead=ahead)
    ys = (y if y.ndim == 1 else y.sum(0).astype(row.x_BTD.dtype) for y in sums)
    return [y.reshape(1, *w.shape[1:]) for y, w in zip(ys, values, strict=True)]


def add(row: Row, vector: str, parts: Sequence[jax.Array], weight: nnx.Param, eps: float = 0.0) -> jax.Array:
    """The stream with the product of the last matrix [..., D] added. vector, parts: what is multiplied, of `VECTORS` of
    `pallas_kernels.one_token.products`."""
    from pallas_kernels.one_token import products as kernels

    x_BTD = row.x_BTD
    w_KN = params.operand(weight, x_BTD.dtype).reshape(-1, x_BTD.shape[-1])
    if x_BTD.shape[0] > 1:
        from pallas_kernels.one_token import rows

        vec = kernels.VECTORS[vector]
        parts = [p.reshape(x_BTD.shape[0], -1) if i < vec.n_rows else p.reshape(-1) for i, p in enumerate(parts)]
        (y,) = rows.products(vec, parts, [w_KN], eps=eps)
        y = y.astype(x_BTD.dtype).reshape(x_BTD.shape)
        return x_BTD + (y if row.multiplier == 1 else y * row.multiplier)
    if KNOBS["tile"] < 64:
        (y,) = kernels.products(kernels.VECTORS[vector], [part.reshape(-1) for part in parts], [w_KN], eps=eps, tile=KNOBS["tile"], shares=1, onto=x_BTD.reshape(-1), multiplier=row.multiplier)
        return y.reshape(x_BTD.shape)
    (sums,) = kernels.products(kernels.VECTORS[vector], [part.reshape(-1) for part in parts], [w_KN], eps=eps)
    y = sums if sums.ndim == 1 else sums.sum(0)
    y = y.astype(x_BTD.dtype)
    y = y if row.multiplier == 1 else y * row.multiplier
    return x_BTD + y.reshape(x_BTD.shape)
