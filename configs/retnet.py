# SPDX-License-Identifier: Apache-2.0
"""RetNet (Sun et al. 2023, arXiv:2307.08621): retention, linear attention with a constant decay for each head.

The published size is fla-hub's, the defaults of flash-linear-attention's configuration.

Command: python train.py --config retnet:tiny
Hardware: tiny, two CPU cores; 16 bytes a parameter for the other, over all devices, before activations.
Expected: 1,351,727,104 parameters.
"""

from hybridlm.config import MLP, Config, HeadNorm, LinearAttention, ModelConfig, Rope
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, layers=2, heads=2, ff=128, **TINY),
    "1.3b": dict(d=2048, layers=24, heads=8, ff=2816),
}


def model(*, d: int, layers: int, heads: int, ff: int, **other) -> ModelConfig:
    widths = {"vocab_size": 32_000, "d_model": d, "norm_eps": 1e-6, "tie_embeddings": False} | other
    retention = LinearAttention(heads, d // heads, 2 * d // heads, rope=Rope(), norm=HeadNorm(eps=1e-6))
    return ModelConfig(**widths, pattern="R-" * layers, blocks={"R": retention, "-": MLP(ff)})


def config(size: str) -> Config:
    return composed("retnet", size, model(**SIZES[size]))
