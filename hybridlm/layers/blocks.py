# SPDX-License-Identifier: Apache-2.0
"""Simple blocks (a mixer of their own, no other blocks inside) and the modules that they configure."""

from collections.abc import Iterator

from flax import nnx

from hybridlm.layers.attention import Attention, AttentionMixer
from hybridlm.layers.mamba1 import Mamba1, Mamba1Mixer
from hybridlm.layers.mamba2 import Mamba2, Mamba2Mixer
from hybridlm.layers.mlp import MLP, FeedForward
from hybridlm.layers.moe import MoE, MoEFeedForward

Simple = Mamba1 | Mamba2 | Attention | MLP | MoE
"""What a pattern symbol, a branch or the part of a shared block can be."""

MIXERS: dict[type, type[nnx.Module]] = {
    Mamba1: Mamba1Mixer,
    Mamba2: Mamba2Mixer,
    Attention: AttentionMixer,
    MLP: FeedForward,
    MoE: MoEFeedForward,
}
"""Sub-config -> the module that it configures."""


def make_mixer(block, d_model: int, **options) -> nnx.Module:
    """The module of a simple block. options: those of every mixer: rngs, init_std, out_std, dtype."""
    return MIXERS[type(block)](block, d_model, **options)


def parts(block, name: str = "") -> Iterator[tuple[str, Simple]]:
    """The simple blocks in a block, each with its dotted field name; of a simple block itself alone, with `name`."""
    prefix = f"{name}." if name else ""
    if type(block) in MIXERS:
        yield name, block
        return
    for field, part in block.parts().items():
        yield from parts(part, f"{prefix}{field}")
