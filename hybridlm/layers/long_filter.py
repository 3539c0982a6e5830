# SPDX-License-Identifier: Apache-2.0
"""Filters of convolutions as long as a document, one a channel: given by a small network of the lag (Hyena), or by the
states of a diagonal system (S4D; StripedHyena's modal form).

Their parameters are float32 and have no weight decay. Axis letters: S lags, C channels, N states, F features.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import params


@dataclass(frozen=True)
class ImplicitFilter:
    """h_t = decay_t * MLP(features of t), sines between its layers (Poli et al. 2023, section 3.3; as HyenaDNA has it).

    Lags are taken as shares of max_len, so a filter that was trained at one length is not that of another.
    """

    max_len: int = 1024
    """Lags; from here on the filter is zero. The longest row that is to be read."""
    d_features: int = 5
    """Features F of a lag: its share of max_len, and (F - 1) / 2 frequencies as cosine and sine."""
    width: int = 64
    """Width of the MLP's hidden layers."""
    n_inner: int = 2
    """Hidden layers behind the first."""
    frequency: float = 10.0
    """Of the sines, at the start; it is learned, for each place of the hidden layers together."""
    fast_decay: float = 0.3
    """Share of max_len in which the fastest channel's window falls to `target`."""
    slow_decay: float = 1.5
    """The same of the slowest one; those between have rates in equal steps."""
    target: float = 1e-2
    """See fast_decay."""
    shift: float = 0.0
    """Added to the window."""

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("max_len", "width", "fast_decay", "slow_decay"))
        require(self.n_inner >= 0, f"n_inner ({self.n_inner}) must not be negative")
        require(
            self.d_features >= 3 and self.d_features % 2 == 1,
            f"d_features ({self.d_features}) must be odd and at least 3: a lag, cosines and sines",
        )
        require(0 < self.target < 1, f"target ({self.target}) must be in (0, 1)")

    def build(self, n_channels: int, rngs: nnx.Rngs) -> "ImplicitNetwork":
        """The network of so many channels."""
        return ImplicitNetwork(self, n_channels, rngs)


class ImplicitNetwork(nnx.Module):
    """features -> sin -> ... -> channels, times an exponential window."""

    def __init__(self, config: ImplicitFilter, n_channels: int, rngs: nnx.Rngs):
        """Weights are uniform up to +-1 / sqrt(fan-in), as published."""
        self.config = config
        F, width, n = config.d_features, config.width, config.n_inner
        first, first_bias, inner, inner_bias, last = params.uniforms(
            rngs, (F, width), (width,), (n, width, width), (n, width), (width, n_channels)
        )
        spread = lambda a, fan_in: (2 * a - 1) / math.sqrt(fan_in)
        weight = lambda a, fan_in, *axes: params.make(spread(a, fan_in), axes, "recurrence")
        self.first, self.first_bias = weight(first, F, None, None), weight(first_bias, F, None)
        self.inner, self.inner_bias = weight(inner, width, None, None, None), weight(inner_bias, width, None, None)
        self.last = weight(last, width, None, "d_inner")
        self.frequency = params.make(jnp.full((width,), config.frequency), (None,), "recurrence")

    def __call__(self, n_lags: int) -> jax.Array:
        """float32 [S, C], of at most max_len lags."""
        c = self.config
        lag_S = jnp.arange(min(n_lags, c.max_len), dtype=jnp.float32)
        share_S1 = (lag_S / max(c.max_len - 1, 1))[:, None]
        bands = (c.d_features - 1) // 2
        angle = lag_S[:, None] * (2 * math.pi / c.max_len) * jnp.linspace(1e-4, bands - 1, bands)[None]
        u = jnp.concatenate([share_S1, jnp.cos(angle), -jnp.sin(angle)], axis=-1)
        wave = lambda u, weight, bias: jnp.sin(self.frequency[...][None] * (u @ weight + bias[None]))
        u = wave(u, self.first[...], self.first_bias[...])
        for i in range(c.n_inner):
            u = wave(u, self.inner[...][i], self.inner_bias[...][i])
        h_SC = u @ self.last[...]
        slow, fast = (-math.log(c.target) / share for share in (c.slow_decay, c.fast_decay))
        window_SC = jnp.exp(-share_S1 * jnp.linspace(slow, fast, h_SC.shape[1])[None])
        return h_SC * (window_SC + c.shift)


@dataclass(frozen=True)
class ModalFilter:
    """h_t = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(t dt A_n): a diagonal state space (Gu et al. 2022, "S4D",
    section 3), started as S4D-Lin. Lags of any number."""

    d_state: int = 16
    """Complex states N of a channel, of each of which the conjugate counts too."""
    dt_min: float = 1e-3
    """Smallest step size at initialisation."""
    dt_max: float = 0.1
    """Largest step size at initialisation."""

    def __post_init__(self):
        check_fields(self)
        require(self.d_state > 0, f"d_state ({self.d_state}) must be positive")
        require(
            0 < self.dt_min <= self.dt_max,
            f"dt_min ({self.dt_min}) must be positive and at most dt_max ({self.dt_max})",
        )

    def build(self, n_channels: int, rngs: nnx.Rngs) -> "Modes":
        """The states of so many channels."""
        return Modes(self, n_channels, rngs)


class Modes(nnx.Module):
    """States of a diagonal system and their weights in the output."""

    def __init__(self, config: ModalFilter, n_channels: int, rngs: nnx.Rngs):
        N, C, axes = config.d_state, n_channels, (None, "d_inner")
        (draw,) = params.uniforms(rngs, (C,))
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        self.dt_log = params.make(low + draw * (high - low), ("d_inner",), "recurrence")
        self.A_log = params.make(jnp.full((N, C), math.log(0.5)), axes, "recurrence")
        A_imaginary = jnp.broadcast_to(math.pi * jnp.arange(N, dtype=jnp.float32)[:, None], (N, C))
        self.A_imaginary = params.make(A_imaginary, axes, "recurrence")
        weights = math.sqrt(0.5) * jax.random.normal(rngs.params(), (2, N, C))
        self.weights = params.make(weights, (None, *axes), "recurrence")

    def __call__(self, n_lags: int) -> jax.Array:
        """float32 [S, C]; a state at a time, so that no array of [S, N, C] exists, forward or backward."""
        lag_S1 = jnp.arange(n_lags, dtype=jnp.float32)[:, None]
        dt_C = jnp.exp(self.dt_log[...])

        @jax.checkpoint
        def add(h_SC, state):
            A_C, weight_C = jax.lax.complex(-jnp.exp(state[0]), state[1]), jax.lax.complex(state[2], state[3])
            weight_C = 2 * weight_C * (jnp.exp(dt_C * A_C) - 1) / A_C
            size_SC, angle_SC = (jnp.exp(lag_S1 * (dt_C * A_C.real)[None]), lag_S1 * (dt_C * A_C.imag)[None])
            real, imaginary = size_SC * jnp.cos(angle_SC), size_SC * jnp.sin(angle_SC)
            return h_SC + weight_C.real[None] * real - weight_C.imag[None] * imaginary, None

        states = (self.A_log[...], self.A_imaginary[...], self.weights[...][0], self.weights[...][1])
        return jax.lax.scan(add, jnp.zeros((n_lags, dt_C.shape[0]), jnp.float32), states)[0]


AnyFilter = ImplicitFilter | ModalFilter
