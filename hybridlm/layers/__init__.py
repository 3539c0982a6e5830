# SPDX-License-Identifier: Apache-2.0
"""One mixer or sublayer a file: its frozen sub-config, its module, its one-token form."""

from hybridlm.layers.attention import Attention
from hybridlm.layers.mamba1 import InnerNorm, Mamba1
from hybridlm.layers.mamba2 import GatedNorm, Mamba2
from hybridlm.layers.mlp import MLP
from hybridlm.layers.moe import MoE, Router
from hybridlm.layers.parallel import Branch, Parallel
from hybridlm.layers.rope import Linear, Llama3, Rope, YaRN
from hybridlm.layers.shared import Shared

__all__ = [
    "MLP", "Attention", "Block", "Branch", "GatedNorm", "InnerNorm", "Linear", "Llama3", "Mamba1", "Mamba2", "MoE",
    "Parallel", "Rope", "Router", "Shared", "YaRN",
]  # fmt: skip

Block = Mamba1 | Mamba2 | Attention | MLP | MoE | Parallel | Shared
"""What a pattern symbol can stand for."""
