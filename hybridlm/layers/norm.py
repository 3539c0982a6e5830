# SPDX-License-Identifier: Apache-2.0
"""RMS norm (Zhang & Sennrich 2019), in float32 whatever the type of its input."""

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm.layers import params


def rms_normalise(x: jax.Array, eps: float) -> jax.Array:
    """`x` over its root mean square along the last axis; float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight along the last axis; the result has the type of the input."""

    def __init__(self, width: int, eps: float = 1e-5, *, axis: str | None = "d_model"):
        """width: size of the last axis; axis: its logical name, for sharding."""
        self.eps = eps
        self.weight = params.ones((width,), (axis,), "norm")

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = params.use(self.weight, jnp.float32)
        return (rms_normalise(x, self.eps) * weight).astype(x.dtype)
