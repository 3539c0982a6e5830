# SPDX-License-Identifier: Apache-2.0
"""Gated short convolution, the operator of LFM2 (Liquid AI 2025): out(C * conv(B * x)), with B, C and x of one product.

Axis letters: B batch, T tokens, D model, F inner width, W convolution window.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import cache as caches
from hybridlm.layers import params, recurrent, short_conv
from hybridlm.layers.block import Kept, Make, Statistic, Tokens, on_arrays


@dataclass(frozen=True)
class GatedConv:
    """A causal convolution of a few tokens between two gates, both linear in the input; no activation."""

    d_conv: int = 3
    """Window W of the convolution."""
    d_inner: int | None = None
    """Inner width F; None: the model's."""
    bias: bool = False
    """Bias of the projections and of the convolution."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "gated_conv_in": Kept("gated convolution: both gates and the input, before the convolution", kernels=True),
        "gated_conv_out": Kept("gated convolution: input of the output projection"),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("d_conv", "d_inner"))

    def check(self, d_model: int) -> None:
        """A gated convolution fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "GatedConvMixer":
        """The mixer of one sublayer."""
        return make.mixer(GatedConvMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """The inner width."""
        return [("d_inner", self.d_inner or d_model, "d_inner")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections and convolution."""
        return 2.0 * (self.d_inner or d_model) * (4 * d_model + self.d_conv)

    def resolved(self, d_model: int) -> "GatedConv":
        """With the inner width."""
        return replace(self, d_inner=self.d_inner or d_model)


class GatedConvMixer(nnx.Module):
    """B, C, x = projection; output projection of C * convolution(B * x)."""

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend

    def __init__(
        self,
        config: GatedConv,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the input and output projections (None: init_std)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, F, W, bias = d_model, config.d_inner or d_model, config.d_conv, config.bias
        out_std = init_std if out_std is None else out_std
        self.w_in = params.matrix(rngs, (D, 3, F), ("d_model", None, "d_inner"), init_std, fused_axes=(1,))
        self.b_in = params.zeros((3, F), (None, "d_inner"), "bias") if bias else None
        self.conv, self.conv_bias = short_conv.make(params.uniforms(rngs, (F, W + 1))[0], ("d_inner",), bias)
        self.w_out = params.matrix(rngs, (F, D), ("d_inner", "d_model"), out_std)
        self.b_out = params.zeros((D,), ("d_model",), "bias") if bias else None

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """The window of the convolution."""
        return {"conv": short_conv.init_window(self.conv, batch, self.dtype, layout)}

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens in parallel, from the cache `old` (None: from nothing, and no new one is made)."""
        u_BTF, gate_BTF = self._project(x_BTD)
        with jax.named_scope("convolve"):
            u_BTF, window = short_conv.convolve(
                u_BTF, self.conv, self.conv_bias, None, segment_ids=tokens.segment_ids, gaps=tokens.gaps,
                window=None if old is None else old["conv"],
            )  # fmt: skip
        return self._output(u_BTF, gate_BTF), {} if old is None else {"conv": window}

    def _step(self, x_BTD, old: dict) -> tuple[jax.Array, dict]:
        """One token."""
        u_BTF, gate_BTF = self._project(x_BTD)
        with jax.named_scope("convolve"):
            u_BF, window = short_conv.step(u_BTF, self.conv, self.conv_bias, None, old["conv"])
        return self._output(u_BF[:, None], gate_BTF), {"conv": window}

    @jax.named_scope("project")
    def _project(self, x_BTD) -> tuple[jax.Array, jax.Array]:
        """B * x and C, [B, T, F]."""
        h_BTcF = params.project(x_BTD.astype(self.dtype), self.w_in, self.b_in)
        h_BTcF = checkpoint_name(sharding.constrain(h_BTcF, "batch", "tokens", None, "d_inner"), "gated_conv_in")
        return h_BTcF[:, :, 0] * h_BTcF[:, :, 2], h_BTcF[:, :, 1]

    @jax.named_scope("output")
    def _output(self, u_BTF: jax.Array, gate_BTF: jax.Array) -> jax.Array:
        y_BTF = sharding.constrain(gate_BTF * u_BTF, "batch", "tokens", "d_inner")
        return params.leave(y_BTF, self.w_out, self.b_out, kept="gated_conv_out")
