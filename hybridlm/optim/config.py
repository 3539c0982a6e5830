# SPDX-License-Identifier: Apache-2.0
"""Loss, gradients, optimizer and schedule."""

from dataclasses import dataclass
from typing import Literal

from hybridlm.errors import require


@dataclass(frozen=True)
class OptimConfig:
    """Loss, gradients, optimizer and schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw for all; muon for matrices, with AdamW for the rest."""
    lr: float = 3e-4
    """Peak learning rate."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices under muon."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decays of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    muon_momentum: float = 0.95
    """Muon's momentum (Nesterov)."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; recurrence parameters, norms, biases and embeddings have none."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None: never."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warmup: cosine or linear to the end, warmup-stable-decay, or constant."""
    warmup_steps: int = 100
    """Steps of linear warmup from zero."""
    decay_fraction: float = 0.2
    """Share of the run that wsd spends in its linear decay."""
    final_lr_ratio: float = 0.1
    """Learning rate of the last step over the peak."""
    accumulate: int = 1
    """Microbatches whose gradients are summed for one step; divides data.batch_size."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition (Chowdhery et al. 2022, PaLM, section 5)."""
    max_skipped: int = 10
    """Non-finite steps in a row, each skipped, after which the run ends with an error."""

    def __post_init__(self):
        for name in ("lr", "muon_lr", "eps", "clip_norm"):
            value = getattr(self, name)
            require(value is None or value > 0, f"optim.{name} ({value}) must be positive")
        for name in ("weight_decay", "warmup_steps", "z_loss"):
            require(getattr(self, name) >= 0, f"optim.{name} ({getattr(self, name)}) must not be negative")
        for name in ("accumulate", "max_skipped"):
            require(getattr(self, name) >= 1, f"optim.{name} ({getattr(self, name)}) must be at least 1")
        for name, values in (("betas", self.betas), ("muon_momentum", (self.muon_momentum,))):
            require(all(0 <= v < 1 for v in values), f"optim.{name} ({getattr(self, name)}) must be in [0, 1)")
        for name in ("decay_fraction", "final_lr_ratio"):
            require(0 <= getattr(self, name) <= 1, f"optim.{name} ({getattr(self, name)}) must be in [0, 1]")
