# SPDX-License-Identifier: Apache-2.0
"""RWKV-7 (Peng et al. 2025, arXiv:2503.14456): its time mix and its channel mix in turn; later layers mix their values
with those of the first.

The published sizes are those of the models trained on World v3, ranks as in their files.

Command: python train.py --config rwkv7:tiny
Hardware: tiny, two CPU cores; 16 bytes a parameter for the others, over all devices, before activations.
Expected: 191,034,624, 450,767,872, 1,527,404,544 and 2,947,735,040 parameters.
"""

from hybridlm.config import ChannelMix, Config, ModelConfig, Rwkv7
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, layers=2, d_head=32, ranks=(8, 16, 8), **TINY),
    "0.1b": dict(d=768, layers=12, ranks=(64, 128, 32)),
    "0.4b": dict(d=1024, layers=24, ranks=(64, 128, 32)),
    "1.5b": dict(d=2048, layers=24, ranks=(96, 256, 64)),
    "2.9b": dict(d=2560, layers=32, ranks=(96, 320, 64)),
}


def model(*, d: int, layers: int, ranks: tuple[int, int, int], d_head: int = 64, **other) -> ModelConfig:
    """ranks: of decays and learning rates, of the gate, of the value residual."""
    widths = {"vocab_size": 65_536, "d_model": d, "tie_embeddings": False} | other
    norms = {"norm": "layer", "norm_bias": "all", "embedding_norm": True}
    decay, gate, value = ranks
    sizes = {"d_head": d_head, "decay_rank": decay, "rate_rank": decay, "gate_rank": gate}
    blocks = {
        "F": Rwkv7(**sizes, values="first"), "R": Rwkv7(**sizes, values="mixed", value_rank=value),
        "C": ChannelMix(4 * d),
    }  # fmt: skip
    return ModelConfig(**widths, **norms, pattern="FC" + "RC" * (layers - 1), blocks=blocks)


def config(size: str) -> Config:
    return composed("rwkv7", size, model(**SIZES[size]))
