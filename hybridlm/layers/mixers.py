# SPDX-License-Identifier: Apache-2.0
"""The mixers: blocks that hold no other sequence mixer. A new one is its file and its name here."""

from typing import get_args

from hybridlm.layers.attention import Attention
from hybridlm.layers.channel_mix import ChannelMix
from hybridlm.layers.convolved_attention import ConvolvedAttention
from hybridlm.layers.depth_moe import DepthMoE
from hybridlm.layers.gated_conv import GatedConv
from hybridlm.layers.gated_delta_net import GatedDeltaNet
from hybridlm.layers.gated_scan import GatedScan
from hybridlm.layers.hyena import Hyena
from hybridlm.layers.kimi_delta import KimiDelta
from hybridlm.layers.latent_attention import LatentAttention
from hybridlm.layers.linear_attention import LinearAttention
from hybridlm.layers.mamba1 import Mamba1
from hybridlm.layers.mamba2 import Mamba2
from hybridlm.layers.mamba3 import Mamba3
from hybridlm.layers.mlp import MLP
from hybridlm.layers.mlstm import MLSTM
from hybridlm.layers.moe import MoE
from hybridlm.layers.relative_attention import RelativeAttention
from hybridlm.layers.rglru import RGLRU
from hybridlm.layers.rwkv4 import Rwkv4
from hybridlm.layers.rwkv4_channel import Rwkv4Channel
from hybridlm.layers.rwkv6 import Rwkv6
from hybridlm.layers.rwkv7 import Rwkv7
from hybridlm.layers.slstm import SLSTM
from hybridlm.layers.titans import Titans

AnyMixer = (
    Mamba1 | Mamba2 | Attention | MLP | MoE | Mamba3 | LinearAttention | GatedDeltaNet | KimiDelta | LatentAttention
    | GatedConv | GatedScan | RGLRU | MLSTM | SLSTM | Rwkv4 | Rwkv4Channel | Rwkv6 | Rwkv7 | ChannelMix
    | ConvolvedAttention | DepthMoE | Hyena | Titans | RelativeAttention
)  # fmt: skip
"""What the command line and stored configs know as a pattern symbol, a branch, or a part of a shared block."""
MIXERS: tuple[type[AnyMixer], ...] = get_args(AnyMixer)
"""Their classes."""
