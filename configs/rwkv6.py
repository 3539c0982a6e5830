# SPDX-License-Identifier: Apache-2.0
"""RWKV-6, Finch (Peng et al. 2024, arXiv:2404.05892): its time mix and its channel mix in turn.

Command: python train.py --config rwkv6:tiny
Hardware: tiny, two CPU cores; 16 bytes a parameter for the others, over all devices, before activations.
Expected: 1,599,873,024 and 3,099,863,040 parameters.
"""

from hybridlm.config import ChannelMix, Config, ModelConfig, Rwkv6
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, layers=2, d_head=32, mix_rank=8, decay_rank=8, **TINY),
    "1.6b": dict(d=2048, layers=24),
    "3b": dict(d=2560, layers=32),
}


def model(
    *, d: int, layers: int, d_head: int = 64, mix_rank: int = 32, decay_rank: int = 64, **other
) -> ModelConfig:  # fmt: skip
    widths = {"vocab_size": 65_536, "d_model": d, "tie_embeddings": False} | other
    norms = {"norm": "layer", "norm_bias": "all", "embedding_norm": True}
    blocks = {"R": Rwkv6(d_head, mix_rank, decay_rank), "C": ChannelMix(7 * d // 2, gate=True)}
    return ModelConfig(**widths, **norms, pattern="RC" * layers, blocks=blocks)


def config(size: str) -> Config:
    return composed("rwkv6", size, model(**SIZES[size]))
