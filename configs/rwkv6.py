# SPDX-License-Identifier: Apache-2.0
"""RWKV-6: its time mix and its channel mix in turn.

Command: python train.py --config rwkv6:tiny
Hardware: tiny, two CPU cores; 16 bytes a parameter for the others, over all devices, before activations.
Expected: 153,280 parameters.
"""

from hybridlm.config import ChannelMix, Config, ModelConfig, Rwkv6
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, layers=2, ff=128, d_head=32, **TINY),
}


def model(*, d: int, layers: int, ff: int, d_head: int = 64, **other) -> ModelConfig:
    widths = {"vocab_size": 65_536, "d_model": d, "tie_embeddings": False} | other
    return ModelConfig(**widths, pattern="RC" * layers, blocks={"R": Rwkv6(d_head=d_head), "C": ChannelMix(ff)})


def config(size: str) -> Config:
    return composed("rwkv6", size, model(**SIZES[size]))
