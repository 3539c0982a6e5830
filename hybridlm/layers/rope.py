# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings: full, partial, proportional, linearly, NTK, YaRN and Llama-3 scaled."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm.errors import ConfigError, require
from hybridlm.fields import check_fields


@dataclass(frozen=True)
class Linear:
    """Position interpolation (Chen et al. 2023): every frequency divided by one factor."""

    factor: float = 2.0
    """The divisor (>= 1)."""

    def __post_init__(self):
        check_fields(self)
        require(self.factor >= 1, f"linear factor ({self.factor}) must be at least 1")


@dataclass(frozen=True)
class YaRN:
    """Context extension by parts (Peng et al. 2023, "YaRN", section 3.2 and equation 15)."""

    factor: float = 4.0
    """Ratio of the new context to the original one (> 1)."""
    original_max_positions: int = 4096
    """Context length of the original training, tokens."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a frequency is kept as it is."""
    beta_slow: float = 1.0
    """Rotations over the original context below which a frequency is divided by `factor`."""
    attention_factor: float | None = None
    """Scale of cos and sin; None: 0.1 ln(factor) + 1."""
    truncate: bool = True
    """Round the ramp's ends to whole frequency indices."""

    def __post_init__(self):
        check_fields(self)
        require(self.factor >= 1, f"yarn factor ({self.factor}) must be at least 1")
        require(
            self.original_max_positions > 0, f"original_max_positions ({self.original_max_positions}) must be positive"
        )
        require(
            self.beta_fast > self.beta_slow, f"beta_fast ({self.beta_fast}) must exceed beta_slow ({self.beta_slow})"
        )

    def scale_times(self, weight: float) -> float:
        """Scale of cos and sin whose logarithmic part has this weight (the paper's equation 15 at 1)."""
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's frequency scaling (Grattafiori et al. 2024; the released reference code)."""

    factor: float = 8.0
    """Divisor of the lowest frequencies (>= 1)."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_max_positions / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_max_positions / high_freq_factor are kept."""
    original_max_positions: int = 8192
    """Context length of the original training, tokens."""

    def __post_init__(self):
        check_fields(self)
        require(self.factor >= 1, f"llama3 factor ({self.factor}) must be at least 1")
        require(
            self.original_max_positions > 0, f"original_max_positions ({self.original_max_positions}) must be positive"
        )
        require(
            self.high_freq_factor > self.low_freq_factor,
            f"high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor ({self.low_freq_factor})",
        )


@dataclass(frozen=True)
class NTK:
    """A longer base: theta times alpha ** (d / (d - 2)) for the rotated width d ("NTK-aware" scaling, Peng et al. 2023,
    definition 1; Hunyuan)."""

    alpha: float = 1000.0
    """The lowest frequency is divided by this (>= 1), the highest stays. Of a context that is extended, the factor."""

    def __post_init__(self):
        check_fields(self)
        require(self.alpha >= 1, f"ntk alpha ({self.alpha}) must be at least 1")


def dynamic_ntk(length: int, original_max_positions: int, factor: float = 1.0) -> NTK:
    """What dynamic NTK scaling is for texts of `length` tokens: nothing up to the original length, then more with every
    token (Peng et al. 2023, section 3.3: factor 1; transformers' rope_type "dynamic" has the factor).

    It is a value for each length and no scaling of its own: caches keep rotated keys, and with every token that is
    written all earlier ones would have to be turned anew, or decoding would not equal the full forward. Raises
    ConfigError for lengths that are not positive and a factor below 1.
    """
    require(length > 0, f"length ({length}) must be positive")
    require(original_max_positions > 0, f"original_max_positions ({original_max_positions}) must be positive")
    require(factor >= 1, f"dynamic factor ({factor}) must be at least 1")
    return NTK(max(1.0, factor * length / original_max_positions - (factor - 1)))


@dataclass(frozen=True)
class Proportional:
    """`fraction` counts pairs: the fastest ones of a whole head turn as ever, the others stand (LFM3)."""

    factor: float = 1.0
    """Divisor of the frequencies (>= 1)."""

    def __post_init__(self):
        check_fields(self)
        require(self.factor >= 1, f"proportional factor ({self.factor}) must be at least 1")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding (Su et al. 2021) of the first `fraction` of each head; pairs are (i, i + half) by default."""

    theta: float = 10_000.0
    """Base of the geometric frequency series."""
    fraction: float = 1.0
    """Share of the head width that is rotated, in (0, 1]."""
    scaling: YaRN | Llama3 | Linear | NTK | Proportional | None = None
    """Which frequencies, where they are not the series itself: for longer contexts, or for some of the pairs."""
    interleaved: bool = False
    """Pairs are neighbours, (2 i, 2 i + 1), as in the paper."""

    def __post_init__(self):
        check_fields(self)
        require(self.theta > 0, f"rope theta ({self.theta}) must be positive")
        require(0 < self.fraction <= 1, f"rope fraction ({self.fraction}) must be in (0, 1]")

    def d_rotated(self, d_head: int) -> int:
        """Width that is rotated of a head of width `d_head`; even, else ConfigError."""
        d = d_head if isinstance(self.scaling, Proportional) else int(d_head * self.fraction)
        if d <= 0 or d % 2:
            raise ConfigError(
                f"rope fraction ({self.fraction}) of d_head ({d_head}) is {d}: it must be even and positive"
            )
        return d


def frequencies(config: Rope, d_head: int) -> tuple[np.ndarray, float]:
    """Radians a position of each rotated pair, float32 [d_rotated / 2], and the scale of cos and sin."""
    d = config.d_rotated(d_head)
    exponents = np.arange(0, d, 2, dtype=np.float64) / d
    theta = config.theta
    if isinstance(config.scaling, NTK):
        require(d > 2, f"rope: d_head ({d_head}) leaves a rotated width of {d}: ntk needs more than 2")
        theta *= config.scaling.alpha ** (d / (d - 2))
    freqs = theta**-exponents
    if isinstance(config.scaling, YaRN):
        return _yarn(freqs, config.theta, d, config.scaling).astype(np.float32), _yarn_scale(config.scaling)
    if isinstance(config.scaling, Llama3):
        freqs = _llama3(freqs, config.scaling)
    if isinstance(config.scaling, Linear):
        freqs = freqs / config.scaling.factor
    if isinstance(config.scaling, Proportional):
        turning = int(config.fraction * d_head // 2)
        freqs = np.where(np.arange(d // 2) < turning, freqs, 0.0) / config.scaling.factor
    return freqs.astype(np.float32), 1.0


def turns(positions_BT: jax.Array, config: Rope, d_head: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of each token's angles, float32 [B, T, d_rotated / 2], scaled as the config says."""
    freqs, scale = frequencies(config, d_head)
    angles_BTR = positions_BT.astype(jnp.float32)[:, :, None] * jnp.expand_dims(freqs, (0, 1))
    return scale * jnp.cos(angles_BTR), scale * jnp.sin(angles_BTR)


def rotate(x_BTHP: jax.Array, positions_BT: jax.Array, config: Rope) -> jax.Array:
    """The first `d_rotated` of each head rotated by its position, in float32; the rest as it is. Type of the input."""
    cos, sin = (a[:, :, None] for a in turns(positions_BT, config, x_BTHP.shape[-1]))
    half = cos.shape[-1]
    if config.interleaved:
        turning, rest = jnp.split(x_BTHP, (2 * half,), axis=-1)
        pairs = turning.astype(jnp.float32).reshape(*turning.shape[:-1], half, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second, rest = jnp.split(x_BTHP, (half, 2 * half), axis=-1)
        first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    if config.interleaved:
        together = jnp.stack(turned, axis=-1).reshape(*first.shape[:-1], 2 * half)
    else:
        together = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([together.astype(x_BTHP.dtype), rest], axis=-1)


def _yarn(freqs: np.ndarray, theta: float, d: int, yarn: YaRN) -> np.ndarray:
    def index_of(rotations: float) -> float:
        """Pair that makes this many rotations over the original context."""
        return d * math.log(yarn.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_of(yarn.beta_fast), index_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001  # a ramp needs a width
    divided = np.clip((np.arange(d // 2) - low) / (high - low), 0, 1)
    return freqs * (1 - divided) + freqs / yarn.factor * divided


def _yarn_scale(yarn: YaRN) -> float:
    return yarn.scale_times(1.0) if yarn.attention_factor is None else yarn.attention_factor


def _llama3(freqs: np.ndarray, llama3: Llama3) -> np.ndarray:
    low, high = llama3.low_freq_factor, llama3.high_freq_factor
    rotations = llama3.original_max_positions * freqs / (2 * math.pi)
    kept = np.clip((rotations - low) / (high - low), 0, 1)
    return kept * freqs + (1 - kept) * freqs / llama3.factor
