# SPDX-License-Identifier: Apache-2.0
"""Recurrences of single channels with gates from the input: minGRU and minLSTM (Feng et al. 2024, "Were RNNs All We
Needed?", arXiv:2410.01201), HGRN (Qin et al. 2023, arXiv:2311.04823).

Axis letters: B batch, T tokens, D model, F channels, W convolution window.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields
from hybridlm.layers import cache as caches
from hybridlm.layers import inspection, ops, params, recurrent, short_conv
from hybridlm.layers.block import Kept, Make, Statistic, Tokens, on_arrays
from hybridlm.layers.linear_attention import first_bound
from hybridlm.layers.norm import gated_rms_norm

PARTS = {"mingru": ("z", "h"), "minlstm": ("f", "i", "h"), "hgrn": ("f", "i", "gate")}
"""What each cell projects."""


@dataclass(frozen=True)
class GatedScan:
    """h_t = decay_t h_(t-1) + x_t, each channel by itself, decay and input from the layer's input; output projection.

    mingru: (1 - z) h + z c. minlstm: f / (f + i) h + i / (f + i) c. hgrn: f h + (1 - f) silu(i), then a gated norm.
    """

    cell: Literal["mingru", "minlstm", "hgrn"] = "mingru"
    """What decay and input are made of."""
    expand: float = 1.0
    """Channels F over model width."""
    d_conv: int | None = None
    """Window W of a causal convolution with a SiLU in front of the projections; None: none."""
    positive: bool = True
    """c of minGRU and minLSTM as in their logarithmic form, x + 1/2 for x >= 0, sigmoid(x) below; else x."""
    lower_bound: bool = True
    """f of HGRN from a learned bound on, which starts at the layer's index over the number of layers; else from 0."""
    norm_eps: float = 1e-5
    """Added to the mean square in the norm of HGRN."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "scan_in": Kept("gated scan: results of the projections", kernels=True),
        "scan_h": Kept("gated scan: what the recurrence gives", kernels=True),
        "mamba_root": Kept("gated norm: reciprocal root mean squares, one number a token and group", kernels=True),
        "scan_out": Kept("gated scan: input of the output projection"),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        require(self.cell in PARTS, f"cell ({self.cell!r}) must be one of {', '.join(PARTS)}")
        require(self.d_conv is None or self.d_conv > 0, f"d_conv ({self.d_conv}) must be positive")

    def inner(self, d_model: int) -> int:
        """Channels F for a model width; ConfigError where that is no whole number."""
        width = self.expand * d_model
        require(width > 0 and width == int(width), f"expand * d_model ({width:g}) must be a positive whole number")
        return int(width)

    def check(self, d_model: int) -> None:
        """Raises ConfigError where this mixer cannot be built at the model width."""
        self.inner(d_model)

    def build(self, d_model: int, make: Make) -> "GatedScanMixer":
        """The mixer of one sublayer."""
        return make.mixer(GatedScanMixer, self, d_model, layer=make.layer)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Channels."""
        return [("inner width", self.inner(d_model), "d_inner")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections and convolution; the scan has no matrix products and counts nothing."""
        return 2.0 * d_model * (self.inner(d_model) * (len(PARTS[self.cell]) + 1) + (self.d_conv or 0))

    def resolved(self, d_model: int) -> "GatedScan":
        """Options of other cells have their defaults."""
        if self.cell == "hgrn":
            return replace(self, positive=True)
        return replace(self, lower_bound=True, norm_eps=1e-5)


class GatedScanMixer(nnx.Module):
    """Convolution; projections; gates; the scan; HGRN's gated norm; output projection."""

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend_run

    def __init__(
        self,
        config: GatedScan,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
        layer: tuple = (0, 1),
    ):
        """init_std, out_std: standard deviations of the input projections and of the output one (None: init_std).
        layer: as of `Make`."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, F, n_parts, W = d_model, config.inner(d_model), len(PARTS[config.cell]), config.d_conv
        draw = None if W is None else params.uniforms(rngs, (D, W + 1))[0]
        self.conv: Any
        self.conv_bias: Any
        self.conv, self.conv_bias = (None, None) if draw is None else short_conv.make(draw, (None,), True)
        self.w_in = params.matrix(rngs, (D, n_parts, F), ("d_model", None, "d_inner"), init_std, fused_axes=(1,))
        hgrn = config.cell == "hgrn"
        bound = jnp.broadcast_to(first_bound(layer), (F,)) if hgrn and config.lower_bound else None
        self.lower_bound = None if bound is None else params.make(bound, ("d_inner",), "recurrence")
        self.norm = params.ones((F,), ("d_inner",), "norm") if hgrn else None
        self.w_out = params.matrix(rngs, (F, D), ("d_inner", "d_model"), init_std if out_std is None else out_std)

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """Decays of the state a token, and the norm of a row's last state."""
        parts_BTcF, _ = self._parts(x_BTD.astype(self.dtype), tokens, {})
        return inspection.decays(self._gates(parts_BTcF)[1], tokens) | recurrent.state_norm(self, x_BTD, tokens)

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """Zero state (float32), and the window of the convolution."""
        kept = {"state": layout.state((batch, self.w_out.shape[-2]), ("batch", "d_inner"))}
        if self.conv is not None:
            kept["conv"] = short_conv.init_window(self.conv, batch, self.dtype, layout)
        return kept

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens from the cache `old` (None: from nothing, and no new one is made)."""
        before = old or {}
        parts_BTcF, new = self._parts(x_BTD.astype(self.dtype), tokens, before)
        with jax.named_scope("scan"):
            x_BTF, g_BTF = self._gates(parts_BTcF)
            h_BTF, new["state"] = ops.linear_scan(
                x_BTF, g_BTF, channels=("d_inner",), segment_ids=tokens.segment_ids, initial_state=before.get("state")
            )
            h_BTF = checkpoint_name(h_BTF, "scan_h")
        if self.norm is not None:
            weight, gate = self.norm[...][None], parts_BTcF[:, :, 2:]
            h_BTF = gated_rms_norm(h_BTF[:, :, None], gate, weight, self.config.norm_eps, 1, True, self.dtype)[:, :, 0]
        with jax.named_scope("output"):
            h_BTF = sharding.constrain(h_BTF.astype(self.dtype), "batch", "tokens", "d_inner")
            return params.leave(h_BTF, self.w_out, kept="scan_out"), new if old is not None else {}

    def _parts(self, x_BTD, tokens: Tokens, before: dict) -> tuple[jax.Array, dict]:
        """What gates and additions are made of, [B, T, 2 or 3, F], and the new window where there is a convolution."""
        new = {}
        if self.conv is not None:
            with jax.named_scope("convolve"):
                x_BTD, new["conv"] = short_conv.convolve(
                    x_BTD, self.conv, self.conv_bias, "silu", segment_ids=tokens.segment_ids, gaps=tokens.gaps,
                    window=before.get("conv"),
                )  # fmt: skip
                x_BTD = sharding.constrain(x_BTD, *sharding.STREAM)
        with jax.named_scope("project"):
            parts_BTcF = checkpoint_name(params.project(x_BTD, self.w_in), "scan_in")
            return sharding.constrain(parts_BTcF, "batch", "tokens", None, "d_inner"), new

    def _gates(self, parts_BTcF) -> tuple[jax.Array, jax.Array]:
        """What is added to the state, and the log decay, [B, T, F] in float32."""
        first, second, *third = (part.astype(jnp.float32) for part in jnp.moveaxis(parts_BTcF, 2, 0))
        log_sigmoid = jax.nn.log_sigmoid
        if self.config.cell == "mingru":
            return jax.nn.sigmoid(first) * self._candidate(second), log_sigmoid(-first)
        if self.config.cell == "minlstm":
            log_f, log_i = log_sigmoid(first), log_sigmoid(second)
            total = jnp.logaddexp(log_f, log_i)
            return jnp.exp(log_i - total) * self._candidate(third[0]), log_f - total
        if self.lower_bound is None:
            return jax.nn.sigmoid(-first) * jax.nn.silu(second), log_sigmoid(first)
        bound = params.use(self.lower_bound, jnp.float32)[None, None]
        g = jnp.logaddexp(log_sigmoid(bound), log_sigmoid(-bound) + log_sigmoid(first))
        return jax.nn.sigmoid(-bound) * jax.nn.sigmoid(-first) * jax.nn.silu(second), g

    def _candidate(self, x: jax.Array) -> jax.Array:
        return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x)) if self.config.positive else x
