# SPDX-License-Identifier: Apache-2.0
"""Mamba-3 (2025, openreview.net/forum?id=HwCvaJOiCj), pure: Mamba-3 and an MLP in turn, one input a head or four.

Command: python train.py --config mamba3:tiny
Hardware: tiny, two CPU cores; 16 bytes a parameter for the others, over all devices, before activations.
Expected: 1,494,723,584 parameters, with one input a head and with four.
"""

from hybridlm.config import MLP, Config, Mamba3, ModelConfig
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, layers=2, ff=128, d_state=16, d_head=32, **TINY),
    "1.5b": dict(d=2048, layers=24, ff=4096),
    "mimo-1.5b": dict(d=2048, layers=24, ff=3824, rank=4),
}


def model(*, d: int, layers: int, ff: int, d_state: int = 128, d_head: int = 64, rank=None, **other) -> ModelConfig:
    widths = {"vocab_size": 128_256, "d_model": d, "tie_embeddings": True} | other
    mamba = Mamba3(d_state=d_state, d_head=d_head, rank=rank)
    return ModelConfig(**widths, pattern="M-" * layers, blocks={"M": mamba, "-": MLP(ff)})


def config(size: str) -> Config:
    return composed("mamba3", size, model(**SIZES[size]))
