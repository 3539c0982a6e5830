# SPDX-License-Identifier: Apache-2.0
"""Feed-forward sublayers: SwiGLU (Shazeer 2020), GELU, squared ReLU (So et al. 2021)."""

from dataclasses import dataclass
from typing import Literal

from hybridlm.errors import require


@dataclass(frozen=True)
class MLP:
    """Feed-forward sublayer of width d_ff."""

    d_ff: int = 4096
    """Feed-forward width F."""
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu2"] = "swiglu"
    """swiglu and geglu are gated (three matrices); gelu (exact or tanh) and relu2 are not (two matrices)."""
    bias: bool = False
    """Bias of the projections."""

    def __post_init__(self):
        require(self.d_ff > 0, f"d_ff ({self.d_ff}) must be positive")

    def check(self, d_model: int) -> None:
        """An MLP fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")
