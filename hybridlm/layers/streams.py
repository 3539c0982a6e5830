# SPDX-License-Identifier: Apache-2.0
"""Several residual streams in the place of one: hyper-connections (Zhu et al. 2024, arXiv:2409.19606), as gated
residuals (Qwen Team 2026, Qwen4-Exp).

The streams of a token stand side by side, [B, T, C D]. Axis letters: B batch, T tokens, D model, C streams, R rank.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybridlm import sharding
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import params
from hybridlm.layers.norm import rms_normalise
from hybridlm.layers.quantized import dot


@dataclass(frozen=True)
class Streams:
    """Residual streams, all of them the embedded tokens at first. A sublayer reads a mean of them, each normed and
    times a gate for each of its channels; what it gives is added to each stream times a gate of its own."""

    n_streams: int = 4
    """Streams C."""
    rank: int = 320
    """Width R in the middle of the projection that makes the gates of what is read."""

    def __post_init__(self):
        check_fields(self, "model.streams.")
        check_positive(self, ("n_streams", "rank"))

    def flops(self, d_model: int, adds: bool = True) -> float:
        """Forward FLOPs per token of reading the streams, and of the gates of what is added to them."""
        return 2.0 * self.n_streams * d_model * (2 * self.rank + (self.n_streams if adds else 0))


class StreamReader(nnx.Module):
    """u = mean_c(sigmoid(up(silu(down(n) / C)))_c * n_c) of the normed streams n, and the gates 2 sigmoid(inject(n) /
    C), one for each stream, of what is added."""

    def __init__(
        self,
        config: Streams,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float,
        eps: float,
        offset: float = 0.0,
        adds: bool = True,
    ):
        """eps, offset: of the norms, as of `RMSNorm`. adds: whether anything is added to what is read here."""
        self.config, self.d_model, self.eps, self.offset = config, d_model, eps, offset
        C, R, E = config.n_streams, config.rank, config.n_streams * d_model
        self.norm = params.make(jnp.full((C, d_model), 1.0 - offset), (None, "d_model"), "norm")
        self.down = params.matrix(rngs, (E, R), ("d_model", None), init_std)
        self.up = params.matrix(rngs, (R, E), (None, "d_model"), init_std)
        self.inject = params.matrix(rngs, (E, C), ("d_model", None), init_std) if adds else None

    def __call__(self, x_BTE: jax.Array) -> jax.Array:
        """[B, T, D] of the streams [B, T, C D]."""
        return self.read(x_BTE)[0]

    def read(self, x_BTE: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(what a sublayer reads [B, T, D], the gates [B, T, C] of what it gives, float32)."""
        C, (n_batch, n_tokens, _) = self.config.n_streams, x_BTE.shape
        n_BTCD = self._normed(x_BTE.reshape(n_batch, n_tokens, C, self.d_model))
        n_BTE = n_BTCD.reshape(x_BTE.shape)
        matrices = [self.down] if self.inject is None else [self.down, self.inject]
        products = params.enter(
            lambda n, *weights: [dot(n, w) for w in weights], n_BTE, matrices, [sharding.STREAM] * len(matrices)
        )
        h_BTR, *gates = (checkpoint_name(a.astype(jnp.float32) / C, "streams_in") for a in products)
        h_BTR = jax.nn.silu(h_BTR).astype(x_BTE.dtype)
        mix_BTE = params.enter(lambda h, w: dot(h, w), h_BTR, [self.up], sharding.STREAM)
        mix_BTCD = jax.nn.sigmoid(mix_BTE.astype(jnp.float32)).reshape(n_BTCD.shape)
        u_BTD = (mix_BTCD * n_BTCD.astype(jnp.float32)).mean(axis=2).astype(x_BTE.dtype)
        u_BTD = sharding.constrain(checkpoint_name(u_BTD, "sublayer_norm"), *sharding.STREAM)
        return u_BTD, 2.0 * jax.nn.sigmoid(gates[0]) if gates else None

    def _normed(self, x_BTCD: jax.Array) -> jax.Array:
        return normed_apart(x_BTCD, self.norm, self.eps, self.offset)


def normed_apart(x_BTCD: jax.Array, weight: Any, eps: float, offset: float) -> jax.Array:
    """RMS norm of each stream by itself, times offset + weight [C, D]; in the type of x."""
    weight_CD = offset + params.use(weight, jnp.float32)
    return (rms_normalise(x_BTCD, eps) * weight_CD[None, None]).astype(x_BTCD.dtype)


def add(x_BTE: jax.Array, y_BTD: jax.Array, gates_BTC: jax.Array) -> jax.Array:
    """The streams with y added to each, times its gate; in float32, the type of the streams."""
    more_BTCD = gates_BTC[..., None] * y_BTD.astype(jnp.float32)[:, :, None]
    return (x_BTE.astype(jnp.float32) + more_BTCD.reshape(x_BTE.shape)).astype(x_BTE.dtype)
