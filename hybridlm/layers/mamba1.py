# SPDX-License-Identifier: Apache-2.0
"""Mamba-1 mixer (Gu & Dao 2023, "Mamba", section 3.4), with the norms of Jamba and Falcon-Mamba and the heads of Zamba.

Axis letters: B batch, T tokens, D model, H heads (one but in Zamba), P channels of a head, N state size, W convolution
window, R rank of dt.
"""

import math
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
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import cache as caches
from hybridlm.layers import inspection, ops, params, recurrent, short_conv
from hybridlm.layers.block import Kept, Make, Statistic, Tokens, on_arrays
from hybridlm.layers.mamba2 import init_dt_bias
from hybridlm.layers.norm import RMSNorm, rms_normalise
from hybridlm.layers.quantized import einsum


@dataclass(frozen=True)
class InnerNorm:
    """RMS norms of B, C and the low-rank dt, each by itself, before dt is projected up."""

    learned: bool = True
    """With weights (Jamba), or without (Falcon-Mamba)."""
    eps: float = 1e-6
    """Added to the mean square."""

    def __post_init__(self):
        check_fields(self)
        require(self.eps >= 0, f"eps ({self.eps}) must not be negative")


@dataclass(frozen=True)
class Mamba1:
    """Mamba-1 mixer: input projection, causal convolution, selective scan, gate, output projection."""

    d_state: int = 16
    """State size N of a channel."""
    expand: float = 2.0
    """Inner width over model width."""
    n_heads: int = 1
    """Heads H: equal parts of the inner width, each with B, C and dt of its own (Zamba)."""
    dt_rank: int | None = None
    """Rank R of dt's projection; None: d_model / 16, rounded up."""
    d_conv: int = 4
    """Window W of the causal convolution."""
    conv_bias: bool = True
    """Bias of the convolution."""
    proj_bias: bool = False
    """Bias of the input and output projections."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    """Behind the convolution; the gate is always a silu."""
    inner_norm: InnerNorm | None = None
    """Norms of B, C and dt; None: none."""
    dt_min: float = 1e-3
    """Smallest step size at initialisation."""
    dt_max: float = 0.1
    """Largest step size at initialisation."""
    dt_init_floor: float = 1e-4
    """Lower clamp of the step size at initialisation."""
    dt_init: Literal["random", "constant"] = "random"
    """dt's projection at initialisation: uniform up to +-dt_scale / sqrt(R), or that number."""
    dt_scale: float = 1.0
    """See dt_init."""
    chunk: int | None = None
    """Chunk length of the scan; None: the op chooses. Results do not depend on it beyond rounding."""

    FREE: ClassVar[frozenset[str]] = frozenset({"chunk"})
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "mamba1_xz": Kept("Mamba-1: inner input and gate, before the convolution", kernels=True),
        "mamba1_conv": Kept("Mamba-1: inner input after convolution and activation"),
        "mamba1_low": Kept("Mamba-1: low-rank dt, B and C, before norms", kernels=True),
        "mamba1_scan": Kept("Mamba-1: output of the selective scan", kernels=True),
        "mamba1_gated": Kept("Mamba-1: input of the output projection"),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("d_state", "expand", "n_heads", "dt_rank", "d_conv", "dt_scale", "chunk"))
        require(
            0 < self.dt_min <= self.dt_max,
            f"dt_min ({self.dt_min}) must be positive and at most dt_max ({self.dt_max})",
        )

    def inner(self, d_model: int) -> int:
        """Inner width H P for a model width; ConfigError where the widths do not divide."""
        d_inner = round(self.expand * d_model)
        require(
            abs(d_inner - self.expand * d_model) < 1e-6 and d_inner % self.n_heads == 0,
            f"expand * d_model ({self.expand * d_model:g}) not divisible by n_heads ({self.n_heads})",
        )
        return d_inner

    def rank(self, d_model: int) -> int:
        """Rank R for a model width."""
        return math.ceil(d_model / 16) if self.dt_rank is None else self.dt_rank

    def check(self, d_model: int) -> None:
        """Raises ConfigError where this mixer cannot be built at the model width."""
        self.inner(d_model)

    def build(self, d_model: int, make: Make) -> "Mamba1Mixer":
        """The mixer of one sublayer."""
        return make.mixer(Mamba1Mixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Channels; where there are several heads, whole heads."""
        if self.n_heads == 1:
            return [("inner width", self.inner(d_model), "d_inner")]
        return [("n_heads", self.n_heads, "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections and convolution; the selective scan has no matrix products and counts nothing."""
        d_inner, rank = self.inner(d_model), self.rank(d_model)
        low = rank + 2 * self.d_state  # of each head, from its own channels: as many products as from all at once
        return 2.0 * d_inner * (3 * d_model + self.d_conv + low + rank)

    def resolved(self, d_model: int) -> "Mamba1":
        """With the rank, and the expansion that the inner width is."""
        return replace(self, dt_rank=self.rank(d_model), expand=self.inner(d_model) / d_model)


class Mamba1Mixer(nnx.Module):
    """Mamba-1: x, z = projection; convolution and activation of x; dt, B, C from x; selective_scan; gate silu(z).

    Tensor parallelism splits the channels; where there are several heads, by whole heads.
    """

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend

    def __init__(
        self,
        config: Mamba1,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the input and output projections (None: init_std)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, H, N, R, W = d_model, config.n_heads, config.d_state, config.rank(d_model), config.d_conv
        P, bias = config.inner(d_model) // H, config.proj_bias
        channels = self._channels
        self.in_xz = params.matrix(rngs, (D, 2, H, P), ("d_model", None, *channels), init_std, fused_axes=(1,))
        self.in_xz_bias = params.zeros((2, H, P), (None, *channels), "bias") if bias else None
        self.x_proj = params.matrix(rngs, (P, H, R + 2 * N), (*channels[::-1], None), init_std, fused_axes=(1,))
        draw_conv, draw_dt, draw_bias = params.uniforms(rngs, (H, P, W + 1), (R, H, P), (H, P))
        self.conv, self.conv_bias = short_conv.make(draw_conv, channels, config.conv_bias)
        draw_dt = 2 * draw_dt - 1 if config.dt_init == "random" else jnp.ones((R, H, P))
        dt_proj = draw_dt * config.dt_scale / math.sqrt(R)
        self.dt_proj = params.make(dt_proj, (None, *channels), "matrix", n_in=1, fused_axes=(1,))
        self.dt_bias = params.make(init_dt_bias(draw_bias, config), channels, "recurrence")
        A_log = jnp.broadcast_to(jnp.log(jnp.arange(1.0, N + 1)), (H, P, N))  # S4D-real (Gu et al. 2022)
        self.A_log = params.make(A_log, (*channels, None), "recurrence")
        self.D = params.ones((H, P), channels, "recurrence")
        norm = config.inner_norm
        scales = [RMSNorm(n, norm.eps, axis=None) if norm is not None and norm.learned else None for n in (R, N, N)]
        self.dt_norm, self.B_norm, self.C_norm = scales
        out_std = init_std if out_std is None else out_std
        self.out = params.matrix(rngs, (H, P, D), (*channels, "d_model"), out_std, n_in=2)
        self.out_bias = params.zeros((D,), ("d_model",), "bias") if bias else None

    @property
    def _channels(self) -> tuple[str | None, str | None]:
        """Logical names of the axes H and P."""
        return (None, "d_inner") if self.config.n_heads == 1 else ("heads", "d_head")

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """Step sizes, decays of the state a token, and the norm of a row's last state."""
        x_BTHP, _ = short_conv.convolve(
            self._project(x_BTD)[0], self.conv, self.conv_bias, self.config.activation,
            segment_ids=tokens.segment_ids, gaps=tokens.gaps,
        )  # fmt: skip
        dt_BTHP = self._select(x_BTHP)[0]
        numbers = inspection.steps(dt_BTHP, jnp.moveaxis(jnp.exp(self.A_log[...]), -1, 0), tokens)
        return numbers | recurrent.state_norm(self, x_BTD, tokens)

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """Zero state (float32), and the window of the convolution."""
        state = (batch, *self.out.shape[-3:-1], self.config.d_state)
        return {
            "state": layout.state(state, ("batch", *self._channels)),
            "conv": short_conv.init_window(self.conv, batch, self.dtype, layout),
        }

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens in parallel, from the cache `old` (None: from nothing, and no new one is made)."""
        ids, window, state = tokens.segment_ids, None, None
        if old is not None:
            window, state = old["conv"], old["state"]
        x_BTHP, z_BTHP = self._project(x_BTD)
        with jax.named_scope("convolve"):
            x_BTHP, window = short_conv.convolve(
                x_BTHP, self.conv, self.conv_bias, self.config.activation, segment_ids=ids, gaps=tokens.gaps,
                window=window,
            )  # fmt: skip
            x_BTHP = checkpoint_name(x_BTHP, "mamba1_conv")
        dt_BTHP, B_BTHN, C_BTHN = self._select(x_BTHP)
        with jax.named_scope("scan"):
            y_BTHP, state = ops.selective_scan(
                x_BTHP, dt_BTHP, -jnp.exp(self.A_log[...]), B_BTHN, C_BTHN, self.D[...], channels=self._channels,
                segment_ids=ids, initial_state=state, chunk=self.config.chunk,
            )  # fmt: skip
            y_BTHP = checkpoint_name(y_BTHP, "mamba1_scan")
        return self._output(y_BTHP, z_BTHP), {} if old is None else {"state": state, "conv": window}

    def _step(self, x_BTD, old: dict) -> tuple[jax.Array, dict]:
        """One token: the recurrence as written (the paper's equation 2)."""
        x_BTHP, z_BTHP = self._project(x_BTD)
        with jax.named_scope("convolve"):
            x_BHP, window = short_conv.step(x_BTHP, self.conv, self.conv_bias, self.config.activation, old["conv"])
        dt_BTHP, B_BTHN, C_BTHN = self._select(x_BHP[:, None])
        with jax.named_scope("scan"):
            x_BHP, dt_BHP1 = x_BHP.astype(jnp.float32), dt_BTHP[:, 0, :, :, None]
            B_BHN, C_BHN = (a[:, 0].astype(jnp.float32) for a in (B_BTHN, C_BTHN))
            decay_BHPN = jnp.exp(-dt_BHP1 * jnp.exp(self.A_log[...])[None])
            state = decay_BHPN * old["state"] + dt_BHP1 * x_BHP[..., None] * B_BHN[:, :, None]
            y_BHP = (state * C_BHN[:, :, None]).sum(-1) + self.D[...][None] * x_BHP
        return self._output(y_BHP[:, None], z_BTHP), {"state": state, "conv": window}

    @jax.named_scope("project")
    def _project(self, x_BTD) -> tuple[jax.Array, jax.Array]:
        """x and z, [B, T, H, P]."""
        xz = params.project(x_BTD.astype(self.dtype), self.in_xz, self.in_xz_bias)
        xz = checkpoint_name(sharding.constrain(xz, "batch", "tokens", None, *self._channels), "mamba1_xz")
        return xz[:, :, 0], xz[:, :, 1]

    @jax.named_scope("select")
    def _select(self, x_BTHP) -> tuple[jax.Array, jax.Array, jax.Array]:
        """dt [B, T, H, P] (float32, after softplus), B and C [B, T, H, N]: what the input selects."""
        rank, n_state, norm = self.dt_proj.shape[-3], self.config.d_state, self.config.inner_norm
        low = einsum("BTHP,PHR->BTHR", x_BTHP, params.held(self.x_proj, x_BTHP.dtype))
        low = checkpoint_name(sharding.constrain(low, "batch", "tokens", self._channels[0], None), "mamba1_low")
        parts = jnp.split(low, [rank, rank + n_state], axis=-1)
        if norm is not None and norm.learned:
            norms: tuple[Any, ...] = (self.dt_norm, self.B_norm, self.C_norm)
            parts = [weigh(a) for weigh, a in zip(norms, parts, strict=True)]
        elif norm is not None:
            parts = [rms_normalise(a, norm.eps).astype(a.dtype) for a in parts]
        low_BTHR, B_BTHN, C_BTHN = parts
        w_RHP = params.held(self.dt_proj, low_BTHR.dtype)
        dt_BTHP = einsum("BTHR,RHP->BTHP", low_BTHR, w_RHP, jnp.float32)
        dt_BTHP = sharding.constrain(dt_BTHP, "batch", "tokens", *self._channels)
        return jax.nn.softplus(dt_BTHP + self.dt_bias[...][None, None]), B_BTHN, C_BTHN

    def _output(self, y_BTHP: jax.Array, z_BTHP: jax.Array) -> jax.Array:
        """Gate in float32, output projection."""
        with jax.named_scope("gate"):
            y_BTHP = y_BTHP.astype(jnp.float32) * jax.nn.silu(z_BTHP.astype(jnp.float32))
            y_BTHP = sharding.constrain(y_BTHP.astype(self.dtype), "batch", "tokens", *self._channels)
        with jax.named_scope("output"):
            return params.leave(y_BTHP, self.out, self.out_bias, kept="mamba1_gated")
