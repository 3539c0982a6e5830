# SPDX-License-Identifier: Apache-2.0
"""RWKV-7: its time mix and its channel mix in turn.

Command: python train.py --config rwkv7:tiny
Hardware: tiny, two CPU cores; 16 bytes a parameter for the others, over all devices, before activations.
Expected: 112,704 parameters.
"""

from hybridlm.config import ChannelMix, Config, ModelConfig, Rwkv7
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, layers=2, ff=128, d_head=32, **TINY),
}


def model(*, d: int, layers: int, ff: int, d_head: int = 64, **other) -> ModelConfig:
    widths = {"vocab_size": 65_536, "d_model": d, "tie_embeddings": False} | other
    return ModelConfig(**widths, pattern="RC" * layers, blocks={"R": Rwkv7(d_head=d_head), "C": ChannelMix(ff)})


def config(size: str) -> Config:
    return composed("rwkv7", size, model(**SIZES[size]))
