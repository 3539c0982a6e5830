# SPDX-License-Identifier: Apache-2.0
"""Mamba-2 mixer (Dao & Gu 2024, "Transformers are SSMs", section 7)."""

from dataclasses import dataclass

from hybridlm.errors import require


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
    """Mamba-2 mixer: fused input projection, causal convolution, selective state space, gated norm, output projection."""

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
    proj_bias: bool = False
    """Bias of the input and output projections."""
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
    chunk: int | None = None
    """Chunk length of the scan; None: the op chooses. Results do not depend on it beyond rounding."""

    def __post_init__(self):
        for name in ("d_state", "d_head", "n_groups", "d_conv"):
            require(getattr(self, name) > 0, f"{name} ({getattr(self, name)}) must be positive")
        require(self.n_heads is None or self.n_heads > 0, f"n_heads ({self.n_heads}) must be positive")
        require(self.chunk is None or self.chunk > 0, f"chunk ({self.chunk}) must be positive")
        require(
            0 < self.dt_min <= self.dt_max, f"dt_min ({self.dt_min}) must be positive and at most dt_max ({self.dt_max})"
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
