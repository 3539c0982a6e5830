# SPDX-License-Identifier: Apache-2.0
"""What the blocks of the config are."""

from .attention_hybridlm import Attention
from .composed_hybridlm import Parallel, Shared
from .delta_hybridlm import GatedDeltaNet, KimiDelta
from .feed_forward_hybridlm import MLP, MoE
from .mamba_hybridlm import Mamba1, Mamba2
from .scan_hybridlm import RGLRU, GatedConv, GatedScan

MIXERS = {
    "Attention": Attention,
    "GatedConv": GatedConv,
    "GatedDeltaNet": GatedDeltaNet,
    "GatedScan": GatedScan,
    "KimiDelta": KimiDelta,
    "MLP": MLP,
    "Mamba1": Mamba1,
    "Mamba2": Mamba2,
    "MoE": MoE,
    "Parallel": Parallel,
    "RGLRU": RGLRU,
    "Shared": Shared,
}
