# SPDX-License-Identifier: Apache-2.0
"""sLSTM, the scalar memory of xLSTM whose gates read its own output (Beck et al. 2024, arXiv:2405.04517, section 2.2).

The block of the authors' package: a short convolution in front of the input and forget gates, all four gates from the
head's own channels, a norm of each head; no projection out.

Axis letters: B batch, T tokens, D model, G gates i, f, z, o, H heads, P head width, W convolution window.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import cache as caches
from hybridlm.layers import inspection, ops, params, recurrent, short_conv
from hybridlm.layers.block import Kept, Make, Statistic, Tokens, on_arrays
from hybridlm.layers.norm import layer_normalise
from hybridlm.layers.quantized import einsum

STATES = ("y", "c", "n", "m")


@dataclass(frozen=True)
class SLSTM:
    """Gates of the input, the last output of the head and a bias; one token after the other; heads of D / H."""

    n_heads: int = 4
    """Heads H; divides the model width."""
    d_conv: int = 4
    """Window W of the convolution in front of the input and forget gates, followed by a silu."""
    norm_eps: float = 1e-5
    """Added to the variance in the heads' norm."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "slstm_gates": Kept("sLSTM: gates before the recurrence", kernels=True),
        "slstm_y": Kept("sLSTM: output of the memory", kernels=True),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("n_heads", "d_conv"))
        require(self.norm_eps >= 0, f"norm_eps ({self.norm_eps}) must not be negative")

    def check(self, d_model: int) -> None:
        """ConfigError where the heads do not divide the model width."""
        require(d_model % self.n_heads == 0, f"d_model ({d_model}) not divisible by n_heads ({self.n_heads})")

    def build(self, d_model: int, make: Make) -> "SLSTMMixer":
        """The mixer of one sublayer."""
        return make.mixer(SLSTMMixer, self, d_model, layer=make.layer)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Heads."""
        return [("n_heads", self.n_heads, "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Gates from the input and from the last output, and the convolution."""
        return 2.0 * d_model * (8 * d_model // self.n_heads + self.d_conv)

    def resolved(self, d_model: int) -> "SLSTM":
        """Nothing is derived."""
        return self


class SLSTMMixer(nnx.Module):
    """i, f from silu(convolution(x)), z, o from x, head by head; the recurrence; layer norm of each head."""

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend_run

    def __init__(
        self,
        config: SLSTM,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
        layer: tuple = (0, 1),
    ):
        """The authors' start: gates of standard deviation sqrt(2 / (5 D)), no recurrent weights, forget gates from 5
        down to -7 over the channels of a head, later in deeper layers. init_std and out_std do not matter.
        layer: as of `Make`."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        H, P, heads = config.n_heads, d_model // config.n_heads, ("heads", "d_head")
        std = math.sqrt(2 / (5 * d_model))
        self.w_in = params.matrix(rngs, (P, 4, H, P), ("d_head", None, *heads), std, fused_axes=(1, 2))
        zeros, axes = jnp.zeros((P, 4, H, P)), ("d_head", None, *heads)
        self.R = params.make(zeros, axes, "matrix", n_in=1, fused_axes=(1, 2), exact=True)
        channel_P = np.arange(P) / max(P - 1, 1)
        forget_P = params.by_layer(layer, lambda i, n: 5.0 - 12.0 * channel_P ** (0.3 + 1.3 * i / max(n - 1, 1)))
        bias = jnp.zeros((4, H, P)).at[1].set(forget_P[None])
        self.bias = params.make(bias, (None, *heads), "recurrence")
        draw_conv = params.uniforms(rngs, (H, P, config.d_conv + 1))[0]
        self.conv, self.conv_bias = short_conv.make(draw_conv, heads, True)
        self.norm = params.ones((H, P), heads, "norm")

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """What the forget gates leave of the sums c and n, and the norm of c / n behind a row's last token."""
        gates_BTGHP, y_BTHP, new = self._memory(x_BTD, tokens, self.init_cache(x_BTD.shape[0], 0))
        before, _ = short_conv.shift(y_BTHP.reshape(x_BTD.shape), segment_ids=tokens.segment_ids, gaps=tokens.gaps)
        before_BTHP, (w_PHP, bias_HP) = before.reshape(y_BTHP.shape), (self.R[:, 1], self.bias[1])
        f_BTHP = gates_BTGHP[:, :, 1] + jnp.einsum("BTHQ,QHP->BTHP", before_BTHP, w_PHP) + bias_HP[None, None]
        return inspection.decays(jax.nn.log_sigmoid(f_BTHP), tokens) | inspection.state_norms(new["c"], new["n"])

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """Zero states (float32), and the window of the convolution."""
        shape, axes = (batch, *self.norm.shape[-2:]), ("batch", "heads")
        states = {name: layout.state(shape, axes) for name in STATES} | {"m": layout.zeros(shape, jnp.float32, axes)}
        return {**states, "conv": short_conv.init_window(self.conv, batch, self.dtype, layout)}

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """All tokens, from the cache `old` (None: from nothing, and no new one is made)."""
        _, y_BTHP, new = self._memory(x_BTD, tokens, old)
        with jax.named_scope("norm_heads"):
            y_BTHP = layer_normalise(y_BTHP, self.config.norm_eps) * self.norm[...][None, None]
            y_BTD = y_BTHP.astype(self.dtype).reshape(x_BTD.shape)
            return sharding.constrain(y_BTD, *sharding.STREAM), new

    def _memory(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, jax.Array, dict]:
        """Gates [B, T, G, H, P] before recurrence and bias, what the memory gives [B, T, H, P], and the new cache."""
        ids, window, initial = tokens.segment_ids, None, None
        if old is not None:
            window, initial = old["conv"], tuple(old[name] for name in STATES)
        H, P = self.norm.shape[-2:]
        x_BTHP = x_BTD.astype(self.dtype).reshape(*x_BTD.shape[:2], H, P)
        x_BTHP = sharding.constrain(x_BTHP, "batch", "tokens", "heads", None)
        with jax.named_scope("convolve"):
            u_BTHP, window = short_conv.convolve(
                x_BTHP, self.conv, self.conv_bias, "silu", segment_ids=ids, gaps=tokens.gaps, window=window
            )
        gates_BTGHP = self._gates(u_BTHP, x_BTHP)
        with jax.named_scope("memory"):
            R_HGPP = jnp.transpose(self.R[...], (2, 1, 3, 0))
            y_BTHP, states = ops.slstm(gates_BTGHP, R_HGPP, self.bias[...], segment_ids=ids, initial=initial)
            y_BTHP = checkpoint_name(y_BTHP, "slstm_y")
        new = {} if old is None or states is None else {**dict(zip(STATES, states, strict=True)), "conv": window}
        return gates_BTGHP, y_BTHP, new

    @jax.named_scope("gates")
    def _gates(self, u_BTHP: jax.Array, x_BTHP: jax.Array) -> jax.Array:
        """The four gates before recurrence and bias: i and f of u, z and o of x."""
        w_PGHP = params.held(self.w_in, self.dtype)
        parts = [
            einsum("BTHQ,QGHP->BTGHP", of, w_PGHP[:, gates])
            for of, gates in ((u_BTHP, slice(2)), (x_BTHP, slice(2, 4)))
        ]
        gates_BTGHP = jnp.concatenate(parts, axis=2)
        return checkpoint_name(sharding.constrain(gates_BTGHP, "batch", "tokens", None, "heads", None), "slstm_gates")
