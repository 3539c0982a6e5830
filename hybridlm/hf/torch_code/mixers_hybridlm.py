# SPDX-License-Identifier: Apache-2.0
"""What the blocks of the config are."""

from .attention_hybridlm import Attention
from .composed_hybridlm import OutputConv, Parallel, Shared
from .compressed_attention_hybridlm import ConvolvedAttention, LatentAttention
from .delta_hybridlm import GatedDeltaNet, KimiDelta
from .feed_forward_hybridlm import MLP, DepthMoE, MoE
from .linear_attention_hybridlm import LinearAttention
from .long_conv_hybridlm import Hyena
from .mamba3_hybridlm import Mamba3
from .mamba_hybridlm import Mamba1, Mamba2
from .relative_attention_hybridlm import RelativeAttention
from .rwkv_hybridlm import ChannelMix, Rwkv4, Rwkv4Channel, Rwkv6, Rwkv7
from .scan_hybridlm import RGLRU, GatedConv, GatedScan
from .titans_hybridlm import MemoryAsContext, Titans
from .xlstm_hybridlm import MLSTM, SLSTM

MIXERS = {
    "Attention": Attention,
    "ChannelMix": ChannelMix,
    "ConvolvedAttention": ConvolvedAttention,
    "DepthMoE": DepthMoE,
    "GatedConv": GatedConv,
    "GatedDeltaNet": GatedDeltaNet,
    "GatedScan": GatedScan,
    "Hyena": Hyena,
    "KimiDelta": KimiDelta,
    "LatentAttention": LatentAttention,
    "LinearAttention": LinearAttention,
    "MLP": MLP,
    "MLSTM": MLSTM,
    "Mamba1": Mamba1,
    "Mamba2": Mamba2,
    "Mamba3": Mamba3,
    "MemoryAsContext": MemoryAsContext,
    "MoE": MoE,
    "OutputConv": OutputConv,
    "Parallel": Parallel,
    "RGLRU": RGLRU,
    "RelativeAttention": RelativeAttention,
    "Rwkv4": Rwkv4,
    "Rwkv4Channel": Rwkv4Channel,
    "Rwkv6": Rwkv6,
    "Rwkv7": Rwkv7,
    "SLSTM": SLSTM,
    "Shared": Shared,
    "Titans": Titans,
}
