# SPDX-License-Identifier: Apache-2.0
"""GLA (Yang et al. 2023, arXiv:2312.06635): linear attention with a decay for each key channel, from the data.

The published sizes are those of flash-linear-attention (legacy/training/configs).

Command: python train.py --config gla:tiny
Hardware: tiny, two CPU cores; 16 bytes a parameter for the others, over all devices, before activations.
Expected: 341,707,776 and 1,365,514,240 parameters.
"""

from hybridlm.config import MLP, ChannelDecay, Config, HeadNorm, LinearAttention, ModelConfig
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, layers=2, heads=2, ff=128, **TINY),
    "340m": dict(d=1024, layers=24, heads=4, ff=2816, tie_embeddings=True),
    "1.3b": dict(d=2048, layers=24, heads=4, ff=5632),
}


def model(*, d: int, layers: int, heads: int, ff: int, **other) -> ModelConfig:
    widths = {"vocab_size": 32_000, "d_model": d, "norm_eps": 1e-6, "tie_embeddings": False} | other
    gla = LinearAttention(heads, d // heads // 2, d // heads, decay=ChannelDecay(rank=16), norm=HeadNorm(eps=1e-6))
    return ModelConfig(**widths, pattern="G-" * layers, blocks={"G": gla, "-": MLP(ff)})


def config(size: str) -> Config:
    return composed("gla", size, model(**SIZES[size]))
