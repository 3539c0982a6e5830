# SPDX-License-Identifier: Apache-2.0
"""Based (Arora et al. 2024, arXiv:2402.18668; HazyResearch/based): linear attention with Taylor features, attention
to a small window, gated convolutions of three tokens between them, an MLP behind each.

Command: python train.py --config based:tiny
Hardware: tiny, two CPU cores; 16 bytes a parameter for the other, over all devices, before activations.
Expected: 398,342,144 parameters.
"""

from hybridlm.config import MLP, Attention, Config, GatedConv, LinearAttention, ModelConfig
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, pattern="c-L-w-", heads=4, d_key=4, ff=128, window=16, **TINY),
    "360m": dict(d=1024, pattern="c-L-w-c-c-" * 5 + "c-c-", heads=16, ff=2048),
}


def model(*, d: int, pattern: str, heads: int, ff: int, d_key: int = 16, window: int = 256, **other) -> ModelConfig:
    widths = {"vocab_size": 50_264, "d_model": d, "tie_embeddings": True} | other
    linear = LinearAttention(
        heads, d_key, d // heads, decay=None, feature_map="taylor", normalizer=True, norm=None, gate=None
    )
    blocks = {
        "c": GatedConv(d_conv=3, d_inner=2 * d, bias=True), "L": linear,
        "w": Attention(n_heads=heads, d_head=d // heads, window=window), "-": MLP(ff),
    }  # fmt: skip
    return ModelConfig(**widths, pattern=pattern, blocks=blocks)


def config(size: str) -> Config:
    return composed("based", size, model(**SIZES[size]))
