# SPDX-License-Identifier: Apache-2.0
"""One mixer or sublayer a file: its frozen sub-config, its module, its one-token form. See `block` for the contract."""

from typing import Union

from hybridlm.layers.attention import Attention
from hybridlm.layers.bidirectional import Bidirectional
from hybridlm.layers.channel_mix import ChannelMix
from hybridlm.layers.convolved_attention import ConvolvedAttention
from hybridlm.layers.depth_moe import DepthMoE
from hybridlm.layers.gated_conv import GatedConv
from hybridlm.layers.gated_delta_net import GatedDeltaNet
from hybridlm.layers.gated_scan import GatedScan
from hybridlm.layers.hyena import Hyena
from hybridlm.layers.kimi_delta import KimiDelta
from hybridlm.layers.latent_attention import LatentAttention
from hybridlm.layers.linear_attention import (
    ChannelDecay,
    FixedDecay,
    ForgetDecay,
    HeadDecay,
    HeadNorm,
    LinearAttention,
)
from hybridlm.layers.long_filter import ImplicitFilter, ModalFilter
from hybridlm.layers.mamba1 import InnerNorm, Mamba1
from hybridlm.layers.mamba2 import GatedNorm, Mamba2
from hybridlm.layers.mamba3 import Mamba3
from hybridlm.layers.memory_context import MemoryAsContext
from hybridlm.layers.mixers import MIXERS
from hybridlm.layers.mlp import MLP
from hybridlm.layers.mlstm import MLSTM
from hybridlm.layers.moe import MoE, Router
from hybridlm.layers.parallel import Branch, Parallel
from hybridlm.layers.rglru import RGLRU
from hybridlm.layers.rope import NTK, Linear, Llama3, Proportional, Rope, YaRN
from hybridlm.layers.rwkv4 import Rwkv4
from hybridlm.layers.rwkv4_channel import Rwkv4Channel
from hybridlm.layers.rwkv6 import Rwkv6
from hybridlm.layers.rwkv7 import Rwkv7
from hybridlm.layers.shared import Shared
from hybridlm.layers.slstm import SLSTM
from hybridlm.layers.titans import Titans

__all__ = [
    "Attention", "BLOCKS", "Bidirectional", "Block", "Branch", "ChannelDecay", "ChannelMix", "ConvolvedAttention",
    "DepthMoE", "FixedDecay", "ForgetDecay", "GatedConv", "GatedDeltaNet", "GatedNorm", "GatedScan", "HeadDecay",
    "HeadNorm", "Hyena", "ImplicitFilter", "InnerNorm", "KimiDelta", "LatentAttention", "Linear", "LinearAttention",
    "Llama3", "MLP", "MLSTM", "Mamba1", "Mamba2", "Mamba3", "MemoryAsContext", "MoE", "ModalFilter", "NTK",
    "Parallel", "Proportional", "RGLRU", "Rope", "Router", "Rwkv4", "Rwkv4Channel", "Rwkv6", "Rwkv7", "SLSTM",
    "Shared", "Titans", "YaRN", "blocks_by_name",
]  # fmt: skip

BLOCKS = (*MIXERS, Parallel, Shared, Bidirectional, MemoryAsContext)
"""What a pattern symbol can stand for on the command line and in stored configs."""
Block = Union[BLOCKS]  # noqa: UP007 (a tuple cannot be written with |)
"""Their union, for annotations."""


def blocks_by_name() -> dict[str, type]:
    """The classes of BLOCKS by name."""
    return {block.__name__: block for block in BLOCKS}
