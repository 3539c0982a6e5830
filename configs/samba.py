# SPDX-License-Identifier: Apache-2.0
"""Samba (Ren et al. 2024, arXiv:2406.07522; microsoft/Samba): Mamba and sliding-window attention in turn, an MLP
behind each.

Command: python train.py --config samba:tiny
Hardware: tiny, two CPU cores; 16 bytes a parameter for the others, over all devices, before activations.
Expected: 421,793,280 and 1,330,207,488 parameters.
"""

from hybridlm.config import MLP, Attention, Config, Mamba1, ModelConfig
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, layers=4, heads=2, ff=128, window=32, **TINY),
    "421m": dict(d=1536, layers=12, heads=12, ff=4096),
    "1.3b": dict(d=2304, layers=18, heads=18, ff=6144),
}


def model(*, d: int, layers: int, heads: int, ff: int, window: int = 2048, **other) -> ModelConfig:
    widths = {"vocab_size": 32_000, "d_model": d, "tie_embeddings": True} | other
    blocks = {"M": Mamba1(), "*": Attention(n_heads=heads, d_head=d // heads, window=window), "-": MLP(ff)}
    return ModelConfig(**widths, pattern="M-*-" * (layers // 2), blocks=blocks)


def config(size: str) -> Config:
    return composed("samba", size, model(**SIZES[size]))
