# SPDX-License-Identifier: Apache-2.0
"""HGRN2 (Qin et al. 2024, arXiv:2404.07904): linear attention whose keys are one minus the decay.

The published size is fla-hub's, the defaults of flash-linear-attention's configuration.

Command: python train.py --config hgrn2:tiny
Hardware: tiny, two CPU cores; 16 bytes a parameter for the other, over all devices, before activations.
Expected: 1,364,396,032 parameters.
"""

from hybridlm.config import MLP, Config, ForgetDecay, HeadNorm, LinearAttention, ModelConfig
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, layers=2, heads=2, ff=128, **TINY),
    "1.3b": dict(d=2048, layers=24, heads=16, ff=5632),
}


def model(*, d: int, layers: int, heads: int, ff: int, **other) -> ModelConfig:
    widths = {"vocab_size": 32_000, "d_model": d, "norm_eps": 1e-6, "tie_embeddings": False} | other
    hgrn2 = LinearAttention(
        heads, d // heads, d // heads, decay=ForgetDecay(), feature_map="silu",
        norm=HeadNorm(per_head=False, weight="channel", eps=1e-6), gate=None,
    )  # fmt: skip
    return ModelConfig(**widths, pattern="H-" * layers, blocks={"H": hgrn2, "-": MLP(ff)})


def config(size: str) -> Config:
    return composed("hgrn2", size, model(**SIZES[size]))
