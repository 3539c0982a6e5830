# SPDX-License-Identifier: Apache-2.0
"""Sublayers of one token a row on a GPU: norm and product in one kernel, what stands before the last product in its.

A mixer that can be computed so has `extend_row(row, cache, length_B, layer)`, which gives the stream behind it, [B, 1,
D], and its cache; or None where its options ask for more than the kernels compute: then `extend` serves it.

Axis letters: B batch, D model, K inputs, N outputs of a product.
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
    """[B, 1, D]."""
    norm: RMSNorm
    multiplier: float
    """Of the mixer's output."""

    @property
    def weight_D(self) -> jax.Array:
        """What the norm multiplies by, float32."""
        return self.norm.weight[...].astype(jnp.float32) + self.norm.offset


def served(x: Any, norm: Any, real_BT: Any) -> bool:
    """Whether kernels can serve a sublayer with this stream and norm."""
    if isinstance(x, tuple) or x.shape[1] != 1 or real_BT is not None or sharding.is_split():
        return False
    few = isinstance(x.shape[0], int) and x.shape[0] <= one_token.MOST_ROWS
    return few and isinstance(norm, RMSNorm) and norm.bias is None and one_token.why_not(x.dtype) is None


def takes(*weights: nnx.Param | None, n_in: int = 1) -> bool:
    """Whether kernels take these matrices; n_in: axes that the product adds over."""
    return all(weight is None or _fits(params.operand(weight, jnp.bfloat16), n_in) for weight in weights)


def _fits(value: Any, n_in: int) -> bool:
    if not isinstance(value, jax.Array):  # rounded to eight bits
        return False
    n_inputs = math.prod(value.shape[:n_in])
    return one_token.product_fits(n_inputs, value.size // n_inputs)


def products(row: Row, *weights: nnx.Param) -> list[jax.Array]:
    """The normed stream times each matrix [D, ...]: [B, ...]."""
    x_BD = row.x_BTD[:, 0]
    values: list[Any] = [params.operand(weight, x_BD.dtype) for weight in weights]
    flat = [w.reshape(w.shape[0], -1) for w in values]
    ys = one_token.products("normed", [x_BD, row.weight_D], flat, eps=row.norm.eps)
    return [y.astype(x_BD.dtype).reshape(-1, *w.shape[1:]) for y, w in zip(ys, values, strict=True)]


def add(row: Row, name: str, parts: Sequence[jax.Array], weight: nnx.Param, eps: float = 0.0) -> jax.Array:
    """The stream with the product of the last matrix [..., D] added. name, parts [B, ...] (a norm's weights [...], the
    last), eps: as `pallas_kernels.one_token.products` takes them."""
    x_BTD = row.x_BTD
    value: Any = params.operand(weight, x_BTD.dtype)
    (y_BD,) = one_token.products(name, parts, [value.reshape(-1, x_BTD.shape[-1])], eps=eps)
    y_BTD = y_BD.astype(x_BTD.dtype)[:, None]
    return x_BTD + (y_BTD if row.multiplier == 1 else y_BTD * row.multiplier)
