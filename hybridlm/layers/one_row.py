# SPDX-License-Identifier: Apache-2.0
"""Sublayers of one token of one row on a GPU: norm and product in one kernel, product and residual stream in another.

A mixer that can be computed so has `extend_row(row, cache, length_B, layer)`, which gives the stream behind it, [1, 1,
D], and its cache; or None where its options ask for more than the kernels compute: then `extend` serves it.

Axis letters: D model, K inputs, N outputs of a product.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import sharding
from hybridlm.layers import params
from hybridlm.layers.norm import RMSNorm
from pallas_kernels import one_row
from pallas_kernels.one_row import ACTIVATIONS, gated_norm

__all__ = ["ACTIVATIONS", "Row", "add", "gated_norm", "products", "served", "takes"]


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
    if isinstance(x, tuple) or x.shape[:2] != (1, 1) or real_BT is not None or sharding.is_split():
        return False
    return isinstance(norm, RMSNorm) and norm.bias is None and one_row.serves(x) is None


def takes(*weights: nnx.Param | None, n_in: int = 1) -> bool:
    """Whether kernels take these matrices; n_in: axes that the product adds over."""
    return all(weight is None or _fits(params.operand(weight, jnp.bfloat16), n_in) for weight in weights)


def _fits(value: Any, n_in: int) -> bool:
    if not isinstance(value, jax.Array):  # rounded to eight bits
        return False
    n_inputs = math.prod(value.shape[:n_in])
    return one_row.fits(n_inputs, value.size // n_inputs)


def products(row: Row, *weights: nnx.Param, gated: str | None = None) -> list[jax.Array]:
    """The normed stream times each matrix [D, ...]: [...]. gated: see `pallas_kernels.one_row.normed`."""
    values = [params.operand(weight, row.x_BTD.dtype) for weight in weights]
    flat = [w.reshape(w.shape[0], -1) for w in values]
    ys = one_row.normed(row.x_BTD.reshape(-1), row.weight_D, flat, eps=row.norm.eps, gated=gated)
    return [y if gated else y.reshape(w.shape[1:]) for y, w in zip(ys, values, strict=True)]


def add(
    row: Row, parts: Sequence[jax.Array], weight: nnx.Param, read: Callable = one_row.as_it_is, eps: float | None = None
) -> jax.Array:
    """The stream with the product of the last matrix [..., D] added; see `pallas_kernels.one_row.added`."""
    x = row.x_BTD
    w_KN = params.operand(weight, x.dtype).reshape(-1, x.shape[-1])
    flat = [part.reshape(-1) for part in parts]
    return one_row.added(x.reshape(-1), flat, read, w_KN, eps=eps, multiplier=row.multiplier).reshape(x.shape)
