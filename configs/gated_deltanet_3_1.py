# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet and attention (Yang et al. 2024, arXiv:2412.06464), three to one as in Qwen3-Next: attention with
partial rotations, normed queries and keys and an output gate; an MLP behind each.

The published sizes with experts in the MLPs' place are `qwen3_next`.

Command: python train.py --config gated_deltanet_3_1:tiny
Hardware: two CPU cores.
Expected: 238,840 parameters.
"""

from hybridlm.config import MLP, Attention, Config, GatedDeltaNet, ModelConfig, Rope
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, layers=4, heads=2, ff=128, **TINY),
}


def model(*, d: int, layers: int, heads: int, ff: int, **other) -> ModelConfig:
    d_head = d // heads
    blocks = {
        "D": GatedDeltaNet(n_heads=2 * heads, n_key_heads=heads, d_key=d_head, d_head=d_head),
        "*": Attention(heads, 1, d_head, rope=Rope(fraction=0.25), qk_norm=True, gate="elementwise"), "-": MLP(ff),
    }  # fmt: skip
    return ModelConfig(**{"d_model": d, "norm_eps": 1e-6} | other, pattern="D-D-D-*-" * (layers // 4), blocks=blocks)


def config(size: str) -> Config:
    return composed("gated_deltanet_3_1", size, model(**SIZES[size]))
