# SPDX-License-Identifier: Apache-2.0
"""Mamba-3 (2025, openreview.net/forum?id=HwCvaJOiCj), hybrid: five Mamba-3 for each attention without positions, an
MLP behind each; heads are normed before the gate.

Command: python train.py --config mamba3_hybrid:tiny
Hardware: tiny, two CPU cores; 16 bytes a parameter for the other, over all devices, before activations.
Expected: 1,457,251,840 parameters.
"""

from hybridlm.config import MLP, Attention, Config, Mamba3, ModelConfig
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, pattern="M-M-*-", heads=2, ff=128, d_state=16, d_head=32, **TINY),
    "1.5b": dict(d=2048, pattern="M-M-M-M-M-*-" * 4, heads=32, ff=4096),
}


def model(*, d: int, pattern: str, heads: int, ff: int, d_state: int = 128, d_head: int = 64, **other) -> ModelConfig:
    widths = {"vocab_size": 128_256, "d_model": d, "tie_embeddings": True} | other
    mamba = Mamba3(d_state=d_state, d_head=d_head, out_norm=True)
    attention = Attention(n_heads=heads, d_head=d // heads, rope=None)
    return ModelConfig(**widths, pattern=pattern, blocks={"M": mamba, "*": attention, "-": MLP(ff)})


def config(size: str) -> Config:
    return composed("mamba3_hybrid", size, model(**SIZES[size]))
