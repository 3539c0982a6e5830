# SPDX-License-Identifier: Apache-2.0
"""The mixers that a grid of `hybridlm study ratio` can have where attention does not stand.

Each is built from (width D, width P of a head, size N of a head's state). Where the block has heads they fill the width
once (Mamba's inner width is that of the model), so that a head's state is N x P numbers. What has no such size takes
its own: RG-LRU, MinGRU and the like have a number a channel, RWKV and sLSTM what the width gives.
"""

from collections.abc import Callable, Mapping

from hybridlm.layers import (
    MLSTM,
    RGLRU,
    SLSTM,
    GatedConv,
    GatedDeltaNet,
    GatedScan,
    Hyena,
    KimiDelta,
    LinearAttention,
    Mamba1,
    Mamba2,
    Mamba3,
    Rwkv4,
    Rwkv6,
    Rwkv7,
    Titans,
)
from hybridlm.layers.block import Block
from hybridlm.layers.linear_attention import ChannelDecay, FixedDecay

Build = Callable[[int, int, int], Block]
"""(d_model, d_head, state) -> block."""

MIXERS: Mapping[str, Build] = {
    "Mamba2": lambda D, P, N: Mamba2(d_state=N, d_head=P, expand=1),
    "Mamba3": lambda D, P, N: Mamba3(d_state=N, d_head=P, expand=1),
    "Mamba1": lambda D, P, N: Mamba1(d_state=N, expand=1),
    "GatedDeltaNet": lambda D, P, N: GatedDeltaNet(n_heads=D // P, d_key=N, d_head=P),
    "KimiDelta": lambda D, P, N: KimiDelta(n_heads=D // P, d_key=N, d_head=P, decay_rank=P, gate_rank=P),
    "GLA": lambda D, P, N: LinearAttention(n_heads=D // P, d_key=N, d_head=P, decay=ChannelDecay()),
    "RetNet": lambda D, P, N: LinearAttention(n_heads=D // P, d_key=N, d_head=P, decay=FixedDecay()),
    "MLSTM": lambda D, P, N: MLSTM(n_heads=D // P, d_key=N, d_head=P),
    "SLSTM": lambda D, P, N: SLSTM(n_heads=D // P),
    "RGLRU": lambda D, P, N: RGLRU(n_heads=D // P),
    "MinGRU": lambda D, P, N: GatedScan("mingru"),
    "MinLSTM": lambda D, P, N: GatedScan("minlstm"),
    "HGRN": lambda D, P, N: GatedScan("hgrn"),
    "Rwkv4": lambda D, P, N: Rwkv4(),
    "Rwkv6": lambda D, P, N: Rwkv6(d_head=P),
    "Rwkv7": lambda D, P, N: Rwkv7(d_head=P),
    "Hyena": lambda D, P, N: Hyena(),
    "GatedConv": lambda D, P, N: GatedConv(),
    "Titans": lambda D, P, N: Titans(n_heads=D // P, d_head=P),
}
"""Name on the command line, that of the block or of what is a kind of one -> how it is built."""
