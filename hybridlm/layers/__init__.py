# SPDX-License-Identifier: Apache-2.0
"""One mixer or sublayer a file: its frozen sub-config, its module, its one-token form. See `block` for the contract.

`Mamba2Mixer(Mamba2(), d_model, rngs=nnx.Rngs(0))` is an `nnx.Module` of its own, called on arrays: docs/library.md.
"""

from typing import get_args

from hybridlm.layers.attention import Attention, AttentionMixer
from hybridlm.layers.bidirectional import Bidirectional, BidirectionalMixer
from hybridlm.layers.channel_mix import ChannelMix, ChannelMixMixer
from hybridlm.layers.convolved_attention import ConvolvedAttention, ConvolvedAttentionMixer
from hybridlm.layers.depth_moe import DepthMoE, DepthMoEFeedForward
from hybridlm.layers.gated_conv import GatedConv, GatedConvMixer
from hybridlm.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetMixer
from hybridlm.layers.gated_scan import GatedScan, GatedScanMixer
from hybridlm.layers.hyena import Hyena, HyenaMixer
from hybridlm.layers.indexed_attention import IndexedAttention, IndexedAttentionMixer
from hybridlm.layers.kimi_delta import KimiDelta, KimiDeltaMixer
from hybridlm.layers.latent_attention import LatentAttention, LatentAttentionMixer
from hybridlm.layers.linear_attention import (
    ChannelDecay,
    FixedDecay,
    ForgetDecay,
    HeadDecay,
    HeadNorm,
    LinearAttention,
    LinearAttentionMixer,
)
from hybridlm.layers.long_filter import ImplicitFilter, ModalFilter
from hybridlm.layers.mamba1 import InnerNorm, Mamba1, Mamba1Mixer
from hybridlm.layers.mamba2 import GatedNorm, Mamba2, Mamba2Mixer
from hybridlm.layers.mamba3 import Mamba3, Mamba3Mixer
from hybridlm.layers.memory_context import MemoryAsContext, MemoryAsContextMixer
from hybridlm.layers.mixers import AnyMixer
from hybridlm.layers.mlp import MLP, FeedForward
from hybridlm.layers.mlstm import MLSTM, MLSTMMixer
from hybridlm.layers.moe import MoE, MoEFeedForward, Router
from hybridlm.layers.ngram_memory import NgramMemory, NgramMemoryMixer
from hybridlm.layers.norm import LayerNorm, RMSNorm
from hybridlm.layers.output_conv import OutputConv, OutputConvMixer
from hybridlm.layers.parallel import Branch, Parallel, ParallelMixer
from hybridlm.layers.relative_attention import RelativeAttention, RelativeAttentionMixer
from hybridlm.layers.rglru import RGLRU, RGLRUMixer
from hybridlm.layers.rope import NTK, Linear, Llama3, Proportional, Rope, YaRN
from hybridlm.layers.rwkv4 import Rwkv4, Rwkv4Mixer
from hybridlm.layers.rwkv4_channel import Rwkv4Channel, Rwkv4ChannelMixer
from hybridlm.layers.rwkv6 import Rwkv6, Rwkv6Mixer
from hybridlm.layers.rwkv7 import Rwkv7, Rwkv7Mixer
from hybridlm.layers.shared import Shared, SharedLink, SharedTransformer
from hybridlm.layers.slstm import SLSTM, SLSTMMixer
from hybridlm.layers.streams import Streams
from hybridlm.layers.titans import Titans, TitansMixer

__all__ = [
    "AnyMixer", "Attention", "AttentionMixer", "BLOCKS", "Bidirectional", "BidirectionalMixer", "Block", "Branch",
    "ChannelDecay", "ChannelMix", "ChannelMixMixer", "ConvolvedAttention", "ConvolvedAttentionMixer", "DepthMoE",
    "DepthMoEFeedForward", "FeedForward", "FixedDecay", "ForgetDecay", "GatedConv", "GatedConvMixer", "GatedDeltaNet",
    "GatedDeltaNetMixer", "GatedNorm", "GatedScan", "GatedScanMixer", "HeadDecay", "HeadNorm", "Hyena", "HyenaMixer",
    "ImplicitFilter", "IndexedAttention", "IndexedAttentionMixer", "InnerNorm", "KimiDelta", "KimiDeltaMixer",
    "LatentAttention", "LatentAttentionMixer", "LayerNorm", "Linear", "LinearAttention", "LinearAttentionMixer",
    "Llama3", "MLP", "MLSTM", "MLSTMMixer", "Mamba1", "Mamba1Mixer", "Mamba2", "Mamba2Mixer", "Mamba3", "Mamba3Mixer",
    "MemoryAsContext", "MemoryAsContextMixer", "MoE", "MoEFeedForward", "ModalFilter", "NTK", "NgramMemory",
    "NgramMemoryMixer", "OutputConv", "OutputConvMixer", "Parallel", "ParallelMixer", "Proportional", "RGLRU",
    "RGLRUMixer", "RMSNorm", "RelativeAttention", "RelativeAttentionMixer", "Rope", "Router", "Rwkv4", "Rwkv4Channel",
    "Rwkv4ChannelMixer", "Rwkv4Mixer", "Rwkv6", "Rwkv6Mixer", "Rwkv7", "Rwkv7Mixer", "SLSTM", "SLSTMMixer", "Shared",
    "SharedLink", "SharedTransformer", "Streams", "Titans", "TitansMixer", "YaRN", "blocks_by_name",
]  # fmt: skip

Block = (
    AnyMixer | Parallel | Shared | Bidirectional | MemoryAsContext | OutputConv | IndexedAttention | NgramMemory
)  # fmt: skip
"""What a pattern symbol can stand for on the command line and in stored configs."""
BLOCKS: tuple[type[Block], ...] = get_args(Block)
"""Their classes."""


def blocks_by_name() -> dict[str, type]:
    """The classes of BLOCKS by name."""
    return {block.__name__: block for block in BLOCKS}
