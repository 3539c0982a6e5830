# SPDX-License-Identifier: Apache-2.0
"""Mamba-2 mixer (Dao & Gu 2024, "Transformers are SSMs", section 7).

Axis letters: B batch, T tokens, D model, H heads, P head width, G state groups, N state size, W convolution window.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.layers import cache as caches
from hybridlm.layers import params
from hybridlm.layers.mlp import ACTIVATIONS
from hybridlm.layers.norm import gated_rms_norm
from pallas_kernels import causal_conv1d, ssd


@dataclass(frozen=True)
class GatedNorm:
    """RMS norm of the scan's output with the gate z: norm(y * silu(z)), or norm(y) * silu(z) with `before_gate`."""

    before_gate: bool = False
    """Normalise first, gate after."""
    n_groups: int | None = None
    """Channels are normalised in this many groups; None: the mixer's n_groups."""
    eps: float = 1e-5
    """Added to the mean square."""


@dataclass(frozen=True)
class Mamba2:
    """Mamba-2 mixer: input projection, causal convolution, selective state space, gated norm, output projection."""

    d_state: int = 128
    """State size N of a head's channel."""
    d_head: int = 64
    """Head width P."""
    n_heads: int | None = None
    """Heads H; None: expand * d_model / d_head."""
    expand: float = 2.0
    """Inner width over model width where n_heads is None."""
    n_groups: int = 1
    """Groups G of heads that share B and C."""
    d_conv: int = 4
    """Window W of the causal convolution over x, B and C."""
    conv_bias: bool = True
    """Bias of the convolution."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    """Behind the convolution; the gate is always a silu."""
    proj_bias: bool = False
    """Bias of the input projection."""
    out_bias: bool | None = None
    """Bias of the output projection; None: where the input projection has one."""
    per_channel_D: bool = False
    """Skip weight D per channel [H, P] instead of per head [H]."""
    gated_norm: GatedNorm | None = GatedNorm()
    """Gated RMS norm; None: y * silu(z) alone."""
    dt_min: float = 1e-3
    """Smallest step size at initialisation."""
    dt_max: float = 0.1
    """Largest step size at initialisation."""
    dt_init_floor: float = 1e-4
    """Lower clamp of the step size at initialisation."""
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    """Clamp of dt after softplus, in training and decoding alike."""
    A_init: tuple[float, float] = (1.0, 16.0)
    """-A is drawn uniformly from this range."""
    multipliers: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)
    """Multiply the results z, x, B, C and dt of the input projection, biases included."""
    chunk: int | None = None
    """Chunk length of the scan; None: the op chooses. Results do not depend on it beyond rounding."""

    def __post_init__(self):
        for name in ("d_state", "d_head", "n_groups", "d_conv"):
            require(getattr(self, name) > 0, f"{name} ({getattr(self, name)}) must be positive")
        require(self.n_heads is None or self.n_heads > 0, f"n_heads ({self.n_heads}) must be positive")
        require(self.chunk is None or self.chunk > 0, f"chunk ({self.chunk}) must be positive")
        require(
            0 < self.dt_min <= self.dt_max,
            f"dt_min ({self.dt_min}) must be positive and at most dt_max ({self.dt_max})",
        )
        low, high = self.dt_limit
        require(0 <= low < high, f"dt_limit ({low}, {high}) must satisfy 0 <= low < high")
        low, high = self.A_init
        require(0 < low <= high, f"A_init ({low}, {high}) must satisfy 0 < low <= high")

    def heads(self, d_model: int) -> int:
        """Heads H for a model width; ConfigError where the widths do not divide."""
        if self.n_heads is not None:
            n_heads = self.n_heads
        else:
            d_inner = self.expand * d_model
            require(
                d_inner == int(d_inner) and int(d_inner) % self.d_head == 0,
                f"expand * d_model ({d_inner:g}) not divisible by d_head ({self.d_head})",
            )
            n_heads = int(d_inner) // self.d_head
        require(n_heads % self.n_groups == 0, f"n_heads ({n_heads}) not divisible by n_groups ({self.n_groups})")
        if self.gated_norm is not None and self.gated_norm.n_groups is not None:
            groups = self.gated_norm.n_groups
            require(
                groups > 0 and n_heads * self.d_head % groups == 0,
                f"gated_norm.n_groups ({groups}) does not divide the inner width ({n_heads * self.d_head})",
            )
        return n_heads

    def check(self, d_model: int) -> None:
        """Raises ConfigError where this mixer cannot be built at the model width."""
        self.heads(d_model)


class Mamba2Mixer(nnx.Module):
    """Mamba-2: z, x, B, C, dt = projections; convolution and SiLU over x, B, C; ssd; norm with the gate z; projection.

    The published fused input projection and convolution are stored by head and by group, so that tensor parallelism can
    split them. Products and convolutions are taken apart, too: each result is an array of its own, which the kernels
    behind it read as it is.
    """

    def __init__(
        self,
        config: Mamba2,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: str = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the input and output projections (None: init_std)."""
        self.config, self.dtype = config, dtype
        D, H, P, G, N, W = d_model, config.heads(d_model), config.d_head, config.n_groups, config.d_state, config.d_conv
        out_std = init_std if out_std is None else out_std
        heads, channels, BC = ("heads",), ("heads", "d_head"), (None, "groups", "d_state")
        self.in_zx = params.matrix(rngs, (D, 2, H, P), ("d_model", None, *channels), init_std, fused_axes=(1,))
        self.in_BC = params.matrix(rngs, (D, 2, G, N), ("d_model", *BC), init_std, fused_axes=(1,))
        self.in_dt = params.matrix(rngs, (D, H), ("d_model", *heads), init_std)
        bias = config.proj_bias
        self.in_zx_bias = params.zeros((2, H, P), (None, *channels), "bias") if bias else None
        self.in_BC_bias = params.zeros((2, G, N), BC, "bias") if bias else None
        self.in_dt_bias = params.zeros((H,), heads, "bias") if bias else None
        draw_x, draw_BC = params.uniforms(
            rngs, (H, P, W + 1), (2, G, N, W + 1)
        )  # conv: +-1 / sqrt(fan-in), as published
        draw_x, draw_BC = ((2 * draw - 1) / math.sqrt(W) for draw in (draw_x, draw_BC))
        self.conv_x = params.make(draw_x[..., :W], (*channels, "conv"), "conv")
        self.conv_BC = params.make(draw_BC[..., :W], (*BC, "conv"), "conv")
        self.conv_x_bias = params.make(draw_x[..., W], channels, "bias") if config.conv_bias else None
        self.conv_BC_bias = params.make(draw_BC[..., W], BC, "bias") if config.conv_bias else None
        draw_dt, draw_A = params.uniforms(rngs, (H,), (H,))
        self.dt_bias = params.make(init_dt_bias(draw_dt, config), heads, "recurrence")
        self.A_log = params.make(
            jnp.log(config.A_init[0] + draw_A * (config.A_init[1] - config.A_init[0])), heads, "recurrence"
        )
        per_D = 2 if config.per_channel_D else 1
        self.D = params.ones((H, P)[:per_D], channels[:per_D], "recurrence")
        self.norm = params.ones((H, P), channels, "norm") if config.gated_norm is not None else None
        self.out = params.matrix(rngs, (H, P, D), (*channels, "d_model"), out_std, n_in=2)
        out_bias = config.proj_bias if config.out_bias is None else config.out_bias
        self.out_bias = params.zeros((D,), ("d_model",), "bias") if out_bias else None

    keeps_all = False
    """The cache does not grow with the number of tokens."""

    def __call__(self, x_BTD: jax.Array, segment_ids: jax.Array | None = None, positions=None) -> jax.Array:
        """[B, T, D] -> [B, T, D] in `dtype`. segment_ids: int32 [B, T], the ops' contract; positions do not matter.

        Padding must not stand inside a document (HybridLM moves such padding away).
        """
        return self._mix(x_BTD, segment_ids, None)[0]

    def init_cache(self, batch: int, max_len: int) -> dict[str, jax.Array]:
        """Zero state (float32), and zeros for the W - 1 inputs that the convolution reads before the next token."""
        c, (H, P, _) = self.config, self.out.shape[-3:]
        return {
            "state": jnp.zeros((batch, H, P, c.d_state), jnp.float32),
            "conv_x": jnp.zeros((batch, c.d_conv - 1, H, P), self.dtype),
            "conv_BC": jnp.zeros((batch, c.d_conv - 1, 2, c.n_groups, c.d_state), self.dtype),
        }

    def extend(self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None) -> tuple[jax.Array, dict]:
        """Outputs of the next T tokens and the cache after them.

        real_BT: bool, False for padding, which leaves the cache as it is; None: all real. layer: index of the
        entries in stacked caches.
        """
        old = {name: caches.read(array, layer) for name, array in cache.items()}
        if x_BTD.shape[1] == 1:
            y_BTD, new = self._step(x_BTD, real_BT, old)
        else:
            y_BTD, new = self._mix(x_BTD, None if real_BT is None else real_BT.astype(jnp.int32), old)
        return y_BTD, {name: caches.write(cache[name], layer, new[name]) for name in cache}

    def _mix(self, x_BTD, segment_ids, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens in parallel, from the state `old` (None: from nothing, and no new state is made)."""
        z_BTHP, x_BTHP, BC_BTcGN, dt_BTH = self._project(x_BTD)
        x_BTHP, BC_BTcGN, new = self._convolve(x_BTHP, BC_BTcGN, segment_ids, old)
        y_BTHP, state = self._scan(x_BTHP, BC_BTcGN, dt_BTH, segment_ids, old)
        if state is not None:
            new["state"] = state
        return self._output(y_BTHP, z_BTHP), new

    def _step(self, x_BTD, real_BT, old: dict) -> tuple[jax.Array, dict]:
        """One token: the recurrence as written (the paper's equation 2, discretised with dt as in section 7)."""
        z_BTHP, x_BTHP, BC_BTcGN, dt_BTH = self._project(x_BTD)
        activation = ACTIVATIONS[self.config.activation]
        x_BHP, conv_x = _conv_step(x_BTHP, self.conv_x, self.conv_x_bias, old["conv_x"], activation)
        BC_BcGN, conv_BC = _conv_step(BC_BTcGN, self.conv_BC, self.conv_BC_bias, old["conv_BC"], activation)
        per_group = x_BHP.shape[1] // self.config.n_groups
        BC_BcHN = jnp.repeat(BC_BcGN.astype(jnp.float32), per_group, axis=2)
        x_BHP, dt_BH1 = x_BHP.astype(jnp.float32), dt_BTH[:, 0, :, None]
        decay_BH1 = jnp.exp(-dt_BH1 * jnp.exp(self.A_log[...])[:, None])
        state = decay_BH1[..., None] * old["state"] + (dt_BH1 * x_BHP)[..., None] * BC_BcHN[:, 0, :, None]
        D_HP = self.D[...] if self.config.per_channel_D else self.D[...][:, None]
        y_BHP = (state * BC_BcHN[:, 1, :, None]).sum(-1) + D_HP * x_BHP
        new = {"state": state, "conv_x": conv_x, "conv_BC": conv_BC}
        if real_BT is not None:
            new = {name: jnp.where(real_BT.reshape(-1, *(1,) * (a.ndim - 1)), a, old[name]) for name, a in new.items()}
        return self._output(y_BHP[:, None].astype(z_BTHP.dtype), z_BTHP), new

    def _project(self, x_BTD) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """z and x [B, T, H, P], B and C [B, T, 2, G, N], dt [B, T, H] (float32, after softplus, within its limits)."""
        x_BTD, c = x_BTD.astype(self.dtype), self.config
        w_DcHP = params.use(self.in_zx, self.dtype)
        z, x = (jnp.tensordot(x_BTD, w_DcHP[:, i], 1) for i in (0, 1))
        if c.proj_bias:
            bias_cHP = params.use(self.in_zx_bias, self.dtype)
            z, x = z + bias_cHP[0], x + bias_cHP[1]
        BC, dt = params.project(x_BTD, self.in_BC, self.in_BC_bias), params.project(x_BTD, self.in_dt, self.in_dt_bias)
        if c.multipliers != (1.0,) * 5:
            of_z, of_x, of_B, of_C, of_dt = c.multipliers
            z, x, dt = z * of_z, x * of_x, dt * of_dt
            BC = BC * jnp.array((of_B, of_C), BC.dtype)[:, None, None]
        names = ("batch", "tokens", "heads", None)
        z, x = (checkpoint_name(sharding.constrain(a, *names), "mamba_zx") for a in (z, x))
        BC = checkpoint_name(sharding.constrain(BC, "batch", "tokens", None, "groups", None), "mamba_BC")
        dt = checkpoint_name(sharding.constrain(dt, *names[:3]), "mamba_dt")
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...])
        if c.dt_limit != (0.0, math.inf):
            dt = jnp.clip(dt, *c.dt_limit)
        return z, x, BC, dt

    def _convolve(self, x_BTHP, BC_BTcGN, segment_ids, old: dict | None) -> tuple[jax.Array, jax.Array, dict]:
        """Causal convolution and SiLU of x, B and C; with `old`, the new convolution states too."""
        old = {"conv_x": None, "conv_BC": None} if old is None else old
        activation, x_bias, BC_bias = self.config.activation, None, None
        if self.config.conv_bias:
            x_bias, BC_bias = self.conv_x_bias[...], self.conv_BC_bias[...]
        x, new_x = _conv(x_BTHP, self.conv_x[...], x_bias, old["conv_x"], segment_ids, ("heads", None), activation)
        names = (None, "groups", None)
        BC, new_BC = _conv(BC_BTcGN, self.conv_BC[...], BC_bias, old["conv_BC"], segment_ids, names, activation)
        x, BC = checkpoint_name(x, "mamba_conv"), checkpoint_name(BC, "mamba_conv")
        return x, BC, {} if new_x is None else {"conv_x": new_x, "conv_BC": new_BC}

    def _scan(self, x_BTHP, BC_BTcGN, dt_BTH, segment_ids, old: dict | None) -> tuple[jax.Array, jax.Array | None]:
        """The state space model, each device on its rows and heads."""
        n_heads, keep = x_BTHP.shape[2], old is not None
        BC_BTcGN = sharding.repeat_for_heads(BC_BTcGN, 3, n_heads)

        def run(x, dt, A, BC, D, segment_ids, initial_state, context_axis=None):
            return ssd(
                x, dt, A, BC[:, :, 0], BC[:, :, 1], D=D, segment_ids=segment_ids, initial_state=initial_state,
                return_final_state=keep, chunk=self.config.chunk, context_axis=context_axis,
            )  # fmt: skip

        rows, heads, state = ("batch", "tokens"), ("batch", "tokens", "heads", None), ("batch", "heads", None, None)
        A_H, initial_BHPN = -jnp.exp(self.A_log[...]), old["state"] if keep else None
        arrays = (x_BTHP, dt_BTH, A_H, BC_BTcGN, self.D[...], segment_ids, initial_BHPN)
        names = (heads, heads[:3], ("heads",), (*rows, None, "groups", None), ("heads", None), rows, state)
        out = sharding.per_device(run, arrays, names, [heads, state] if keep else heads, split_tokens=not keep)
        y_BTHP, state_BHPN = out if keep else (out, None)
        return checkpoint_name(y_BTHP, "mamba_ssd"), state_BHPN

    def _output(self, y_BTHP: jax.Array, z_BTHP: jax.Array) -> jax.Array:
        """Gate, norm in float32, output projection."""
        norm = self.config.gated_norm
        if norm is None:
            y = (y_BTHP.astype(jnp.float32) * jax.nn.silu(z_BTHP.astype(jnp.float32))).astype(self.dtype)
        else:
            n_groups = self.config.n_groups if norm.n_groups is None else norm.n_groups
            y = gated_rms_norm(y_BTHP, z_BTHP, self.norm[...], norm.eps, n_groups, norm.before_gate, self.dtype)
        y_BTHP = sharding.constrain(y, "batch", "tokens", "heads", None)
        y_BTHP = checkpoint_name(y_BTHP, "mamba_norm")
        out_BTD = jnp.tensordot(y_BTHP, params.use(self.out, y_BTHP.dtype), 2)
        return out_BTD if self.out_bias is None else out_BTD + params.use(self.out_bias, out_BTD.dtype)


def init_dt_bias(uniform_H: jax.Array, config: Mamba2) -> jax.Array:
    """Inverse softplus of step sizes drawn log-uniformly from [dt_min, dt_max], at least dt_init_floor."""
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    dt_H = jnp.maximum(jnp.exp(low + uniform_H * (high - low)), config.dt_init_floor)
    return dt_H + jnp.log(-jnp.expm1(-dt_H))


def _conv(x, weight, bias, old, segment_ids, names: tuple, activation: str) -> tuple[jax.Array, jax.Array | None]:
    """causal_conv1d and activation over x [B, T, *channels], weight [*channels, W]; names: the channels' logical axes.

    The op knows silu; another activation comes behind it."""
    in_op = activation if activation == "silu" else None

    def run(x, weight, bias, old, segment_ids, context_axis=None):
        out = causal_conv1d(
            x.reshape(*x.shape[:2], -1),
            weight.reshape(-1, weight.shape[-1]),
            None if bias is None else bias.reshape(-1),
            activation=in_op,
            segment_ids=segment_ids,
            initial_state=None if old is None else old.reshape(*old.shape[:2], -1),
            return_final_state=old is not None,
            gaps=False,
            context_axis=context_axis,
        )
        return out.reshape(x.shape) if old is None else (out[0].reshape(x.shape), out[1].reshape(old.shape))

    tokens, window = ("batch", "tokens", *names), ("batch", None, *names)
    arrays, axes = (x, weight, bias, old, segment_ids), (tokens, (*names, None), names, window, tokens[:2])
    out_axes = tokens if old is None else [tokens, window]
    out = sharding.per_device(run, arrays, axes, out_axes, split_tokens=old is None)
    y, new = (out, None) if old is None else out
    return (y if in_op else ACTIVATIONS[activation](y)), new


def _conv_step(x_BT, weight: nnx.Param, bias: nnx.Param | None, old, activation) -> tuple[jax.Array, jax.Array]:
    """One token of the convolution with its activation, [B, *channels], and the new window."""
    window = jnp.concatenate([old, x_BT.astype(old.dtype)], axis=1)
    y = (window.astype(jnp.float32) * jnp.moveaxis(weight[...], -1, 0)).sum(1)
    y = y if bias is None else y + bias[...]
    return activation(y).astype(x_BT.dtype), window[:, 1:]
