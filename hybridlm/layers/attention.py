# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention with an optional sigmoid output gate (Qiu et al. 2025, "Gated Attention for LLMs")."""

from dataclasses import dataclass
from typing import Literal

from hybridlm.errors import require
from hybridlm.layers.rope import Rope


@dataclass(frozen=True)
class Attention:
    """Causal attention: MHA, GQA or MQA; rotary, windowed, capped, with sinks, gated."""

    n_heads: int = 16
    """Query heads H."""
    n_kv_heads: int | None = None
    """Key/value heads K; None: n_heads (MHA); 1 is MQA."""
    d_head: int = 64
    """Head width P."""
    rope: Rope | None = Rope()
    """Rotary embedding; None: no positions (NoPE)."""
    qk_norm: bool = False
    """RMS norm of each query and key head before the rotation."""
    qk_norm_eps: float = 1e-6
    """Added to the mean square in qk_norm."""
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it; None: all before it."""
    scale: float | None = None
    """Multiplier of the scores; None: d_head ** -0.5."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap)."""
    sinks: bool = False
    """A learned logit per head in the softmax denominator."""
    gate: Literal["elementwise", "head"] | None = None
    """Sigmoid output gate from the layer's input: per element of a head, per head, or none."""
    qkv_bias: bool = False
    """Bias of the query, key and value projections."""
    out_bias: bool = False
    """Bias of the output projection."""

    def __post_init__(self):
        for name in ("n_heads", "d_head", "n_kv_heads", "window", "softcap", "scale"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} ({value}) must be positive")
        require(
            self.n_heads % self.kv_heads == 0, f"n_heads ({self.n_heads}) not divisible by n_kv_heads ({self.kv_heads})"
        )
        if self.rope is not None:
            self.rope.d_rotated(self.d_head)

    @property
    def kv_heads(self) -> int:
        """Key/value heads K."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def check(self, d_model: int) -> None:
        """Attention fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")
