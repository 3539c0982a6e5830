# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings: full, partial, YaRN and Llama-3 scaled."""

from dataclasses import dataclass

from hybridlm.errors import ConfigError, require


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
        require(self.factor >= 1, f"yarn factor ({self.factor}) must be at least 1")
        require(self.original_max_positions > 0, f"original_max_positions ({self.original_max_positions}) must be positive")
        require(self.beta_fast > self.beta_slow, f"beta_fast ({self.beta_fast}) must exceed beta_slow ({self.beta_slow})")


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
        require(self.factor >= 1, f"llama3 factor ({self.factor}) must be at least 1")
        require(self.original_max_positions > 0, f"original_max_positions ({self.original_max_positions}) must be positive")
        require(
            self.high_freq_factor > self.low_freq_factor,
            f"high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor ({self.low_freq_factor})",
        )


@dataclass(frozen=True)
class Rope:
    """Rotary embedding (Su et al. 2021) of the first `fraction` of each head; pairs are (i, i + half)."""

    theta: float = 10_000.0
    """Base of the geometric frequency series."""
    fraction: float = 1.0
    """Share of the head width that is rotated, in (0, 1]."""
    scaling: YaRN | Llama3 | None = None
    """Frequency scaling for longer contexts."""

    def __post_init__(self):
        require(self.theta > 0, f"rope theta ({self.theta}) must be positive")
        require(0 < self.fraction <= 1, f"rope fraction ({self.fraction}) must be in (0, 1]")

    def d_rotated(self, d_head: int) -> int:
        """Width that is rotated of a head of width `d_head`; even, else ConfigError."""
        d = int(d_head * self.fraction)
        if d <= 0 or d % 2:
            raise ConfigError(f"rope fraction ({self.fraction}) of d_head ({d_head}) is {d}: it must be even and positive")
        return d
