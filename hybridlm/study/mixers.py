# SPDX-License-Identifier: Apache-2.0
"""The mixers that a grid of `hybridlm study ratio` can have where attention does not stand.

Each is built from (width D, width P of a head, size N of a head's state). Where the block has heads they fill the width
once (Mamba's inner width is that of the model), so that a head's state is N x P numbers. What has no such size takes
its own: RG-LRU, MinGRU and the like have a number a channel, RWKV and sLSTM what the width gives. Where states are to
have equal bytes (`fitted`), what has a number a channel gets more channels.
"""

import functools
from collections.abc import Callable, Mapping

from hybridlm.errors import ConfigError, require
from hybridlm.infer.cache_size import STATES, cache_size
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
from hybridlm.model.config import ModelConfig

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

WIDENED: Mapping[str, Build] = {
    "RGLRU": lambda D, P, N: RGLRU(n_heads=max(1, N * D // P), d_inner=N * D),
    "MinGRU": lambda D, P, N: GatedScan("mingru", expand=float(N)),
    "MinLSTM": lambda D, P, N: GatedScan("minlstm", expand=float(N)),
    "HGRN": lambda D, P, N: GatedScan("hgrn", expand=float(N)),
}
"""Those with a number a channel, of N times the model's width: D x N numbers, as heads of state N have."""
LEAST = 0.75
"""Of the bytes asked for, what a fitted state has of them."""


@functools.cache
def fitted(name: str, d_model: int, d_head: int, state_bytes: int) -> Block:
    """The mixer whose recurrent state of a row is the largest of at most `state_bytes`, and of no less than three
    quarters of it; windows of convolutions are no part of it.

    ConfigError where the mixer has no such size, with those that it has.
    """
    build = (MIXERS | WIDENED)[name]

    def at(size: int) -> tuple[int, Block | None]:
        """0 bytes of one that cannot be built: the smallest states, of channels that are turned in pairs."""
        try:
            block = build(d_model, d_head, size)
            return bytes_of(block, d_model), block
        except ConfigError:
            return 0, None

    low, high = 0, 1
    while at(high)[0] <= state_bytes and high <= state_bytes:  # a number a byte and more: none is larger
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle)[0] <= state_bytes else (low, middle)
    (less, block), (more, _) = at(low) if low else (0, None), at(high)
    there = [f"{n:,}" for n in dict.fromkeys((less, more)) if n]
    has = f"has states of {' or '.join(there)} bytes" if there else "has no recurrent state"
    said = f"state_bytes ({state_bytes}): {name} of width {d_model}, heads of {d_head}, {has}"
    require(block is not None and less >= LEAST * state_bytes, said)
    assert block is not None
    return block


@functools.cache
def bytes_of(block: Block, d_model: int) -> int:
    """Of a mixer's recurrent states, of one row, as they are computed in."""
    alone = ModelConfig(d_model=d_model, pattern="M", blocks={"M": block}, compute_dtype="float32")
    return cache_size(alone, 1, 1).total(STATES).bytes
