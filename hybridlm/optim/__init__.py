# SPDX-License-Identifier: Apache-2.0
"""How a model learns: update rules and schedules as values, and the config that holds one of each."""

from hybridlm.optim.adamw import AdamW
from hybridlm.optim.config import OptimConfig
from hybridlm.optim.muon import Muon, muon_dims
from hybridlm.optim.objective import Masked, NextToken
from hybridlm.optim.optimizer import make_optimizer
from hybridlm.optim.schedule import Constant, Cosine, LinearDecay, Wsd

__all__ = [
    "AdamW", "Constant", "Cosine", "LinearDecay", "Masked", "Muon", "NextToken", "OptimConfig", "Wsd",
    "make_optimizer", "muon_dims",
]  # fmt: skip
