# SPDX-License-Identifier: Apache-2.0
"""Kimi Linear (Kimi Team 2025, arXiv:2510.26692): Kimi Delta Attention and latent attention without positions, three
to one; an MLP behind each.

The published size, with experts in the MLPs' place, is `kimi_linear`.

Command: python train.py --config kimi_linear_3_1:tiny
Hardware: two CPU cores.
Expected: 213,510 parameters.
"""

from hybridlm.config import MLP, Config, KimiDelta, LatentAttention, ModelConfig
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, layers=4, heads=2, ff=128, **TINY),
}


def model(*, d: int, layers: int, heads: int, ff: int, **other) -> ModelConfig:
    d_head = d // heads
    blocks = {
        "K": KimiDelta(n_heads=heads, d_key=d_head, d_head=d_head, decay_rank=d_head, gate_rank=d_head),
        "*": LatentAttention(heads, d_nope=d_head, d_rope=d_head // 2, d_value=d_head, kv_rank=d // 2, rope=None),
        "-": MLP(ff),
    }
    return ModelConfig(**{"d_model": d} | other, pattern="K-K-K-*-" * (layers // 4), blocks=blocks)


def config(size: str) -> Config:
    return composed("kimi_linear_3_1", size, model(**SIZES[size]))
