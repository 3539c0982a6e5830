# SPDX-License-Identifier: Apache-2.0
"""Hyena of order 2 (Poli et al. 2023, arXiv:2302.10866): two gates around a convolution as long as the document.

Axis letters: B batch, T tokens, S tokens of a cache, D model, C channels, W window of the short convolution.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields
from hybridlm.layers import cache as caches
from hybridlm.layers import ops, params, short_conv
from hybridlm.layers.block import Kept, Make, Output, Statistic, Tokens, on_arrays
from hybridlm.layers.long_filter import AnyFilter, ImplicitFilter


@dataclass(frozen=True)
class Hyena:
    """Hyena mixer: projections to x0, x1 and v, a short convolution of each, x0 * longconv(x1 * v), output projection.

    Decoding keeps what the long convolution has read, [tokens, channels], and each new token sums over all of it, for
    which it makes the filter anew: no state of fixed size gives the same.
    """

    filter: AnyFilter = ImplicitFilter()  # noqa: RUF009 (frozen)
    """Of the long convolution, by channel."""
    d_conv: int = 3
    """Window W of the short convolution."""
    conv_bias: bool = True
    """Bias of the short convolution."""
    proj_bias: bool = True
    """Bias of the input and output projections."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "hyena_in": Kept("Hyena: x0, x1 and v, before the short convolution", kernels=True),
        "hyena_gated": Kept("Hyena: input of the long convolution"),
        "hyena_conv": Kept("Hyena: output of the long convolution", kernels=True),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True
    GROWS: ClassVar[Mapping[str, str]] = {"history": "inputs of long convolutions"}

    def __post_init__(self):
        check_fields(self)
        require(self.d_conv > 0, f"d_conv ({self.d_conv}) must be positive")

    def check(self, d_model: int) -> None:
        """Hyena fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "HyenaMixer":
        """The mixer of one sublayer."""
        return make.mixer(HyenaMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Channels."""
        return [("inner width", d_model, "d_inner")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections, the short convolutions, and the long one by Fourier transforms; the filter is made once a batch
        and counts nothing."""
        return d_model * (2.0 * (4 * d_model + 3 * self.d_conv) + fft_flops(seq_len))

    def resolved(self, d_model: int) -> "Hyena":
        """Itself."""
        return self


def fft_flops(seq_len: int) -> float:
    """FLOPs per token and channel of a causal convolution as long as the row: two real transforms of 2 T numbers, at
    2.5 n log2 n, and T products of complex numbers between them."""
    return 10 * math.log2(2 * seq_len) + 6


class HyenaMixer(nnx.Module):
    """x0 * (h ** (x1 * v) + D (x1 * v)) between projections; h is the filter, ** the convolution."""

    cache_grows = True
    __call__ = on_arrays

    def __init__(
        self,
        config: Hyena,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the input and output projections (None: init_std)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, C, W, bias = d_model, d_model, config.d_conv, config.proj_bias
        channels = (None, "d_inner")
        self.w_in = params.matrix(rngs, (D, 3, C), ("d_model", *channels), init_std, fused_axes=(1,))
        self.w_in_bias = params.zeros((3, C), channels, "bias") if bias else None
        (draw,) = params.uniforms(rngs, (3, C, W + 1))
        self.conv, self.conv_bias = short_conv.make(draw, channels, config.conv_bias)
        self.filter = config.filter.build(C, rngs)
        self.D = params.make(jax.random.normal(rngs.params(), (C,)), ("d_inner",), "recurrence")
        out_std = init_std if out_std is None else out_std
        self.out = params.matrix(rngs, (C, D), ("d_inner", "d_model"), out_std)
        self.out_bias = params.zeros((D,), ("d_model",), "bias") if bias else None

    def mix(self, x_BTD: jax.Array, tokens: Tokens) -> Output:
        """[B, T, D] -> [B, T, D] in `dtype`; positions do not matter."""
        xv_BTcC, ids, weights = self._project(x_BTD), tokens.segment_ids, (self.conv, self.conv_bias)
        with jax.named_scope("convolve"):
            xv_BTcC, _ = short_conv.convolve(xv_BTcC, *weights, None, segment_ids=ids, gaps=tokens.gaps)
        x0_BTC, u_BTC = self._gate(xv_BTcC)
        with jax.named_scope("convolve_document"):
            h_TC = self.filter(x_BTD.shape[1])
            y_BTC = ops.long_conv(u_BTC, h_TC, self.D[...], channel="d_inner", segment_ids=ids)
            y_BTC = checkpoint_name(y_BTC, "hyena_conv")
        return Output(self._output(x0_BTC, y_BTC))

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """The window of the short convolution, and what the long one has read: [B, S, 1, C], S is max_len."""
        history = layout.zeros((batch, max_len, 1, self.D.shape[-1]), self.dtype)
        return {"conv": short_conv.init_window(self.conv, batch, self.dtype, layout), "history": history}

    def extend(
        self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *, gaps: bool = True
    ) -> tuple[jax.Array, dict]:
        """Outputs of the next T tokens and the cache after them; see `block.Mixer`."""
        batch, n_tokens, _ = x_BTD.shape
        ids = None if real_BT is None else real_BT.astype(jnp.int32)
        real_BT = jnp.ones((batch, n_tokens), bool) if real_BT is None else real_BT
        window: Any = caches.read(cache["conv"], layer)
        xv_BTcC = self._project(x_BTD)
        with jax.named_scope("convolve"):
            if n_tokens == 1:
                xv_BcC, new = short_conv.step(xv_BTcC, self.conv, self.conv_bias, None, window)
                xv_BTcC = xv_BcC[:, None]
                window = caches.unless_padding(real_BT, {"conv": new}, {"conv": window})["conv"]
            else:
                xv_BTcC, window = short_conv.convolve(
                    xv_BTcC, self.conv, self.conv_bias, None, segment_ids=ids, gaps=gaps, window=window
                )
        x0_BTC, u_BTC = self._gate(xv_BTcC)
        position_BT = length_B[:, None] + jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - real_BT
        n_slots = cache["history"].shape[-3]
        slot_BT = jnp.where(real_BT, position_BT, n_slots)
        history = caches.write_slots(cache["history"], layer, slot_BT, u_BTC[:, :, None])
        with jax.named_scope("convolve_document"):
            y_BTC = self._from_history(caches.read(history, layer)[:, :, 0], position_BT)
            y_BTC = (y_BTC + self.D[...][None, None] * u_BTC.astype(jnp.float32)).astype(self.dtype)
        new_cache = {"conv": caches.write(cache["conv"], layer, window), "history": history}
        return self._output(x0_BTC, y_BTC), new_cache

    def _from_history(self, history_BSC: jax.Array, position_BT: jax.Array) -> jax.Array:
        """The long convolution at positions of the documents whose inputs are the history, float32 [B, T, C]."""
        n_slots = history_BSC.shape[1]
        h_SC = self.filter(n_slots)
        if position_BT.shape[1] > 1:
            y_BSC = ops.long_conv(history_BSC.astype(jnp.float32), h_SC, None, channel="d_inner", segment_ids=None)
            return jnp.take_along_axis(y_BSC, jnp.minimum(position_BT, n_slots - 1)[..., None], axis=1)
        lag_BS = position_BT - jnp.arange(n_slots)[None]
        known_BS = (lag_BS >= 0) & (lag_BS < h_SC.shape[0])
        weight_BSC = jnp.where(known_BS[..., None], h_SC[jnp.clip(lag_BS, 0, h_SC.shape[0] - 1)], 0.0)
        return (weight_BSC * history_BSC.astype(jnp.float32)).sum(1, keepdims=True)

    @jax.named_scope("project")
    def _project(self, x_BTD) -> jax.Array:
        """x0, x1 and v, [B, T, 3, C]."""
        xv_BTcC = params.project(x_BTD.astype(self.dtype), self.w_in, self.w_in_bias)
        return checkpoint_name(sharding.constrain(xv_BTcC, "batch", "tokens", None, "d_inner"), "hyena_in")

    def _gate(self, xv_BTcC) -> tuple[jax.Array, jax.Array]:
        """x0, and what the long convolution reads, [B, T, C]."""
        x0_BTC, x1_BTC, v_BTC = (xv_BTcC[:, :, i] for i in range(3))
        return x0_BTC, checkpoint_name(x1_BTC * v_BTC, "hyena_gated")

    @jax.named_scope("output")
    def _output(self, x0_BTC, y_BTC) -> jax.Array:
        y_BTC = sharding.constrain(x0_BTC * y_BTC, "batch", "tokens", "d_inner")
        return params.leave(y_BTC, self.out, self.out_bias)
