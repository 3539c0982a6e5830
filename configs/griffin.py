# SPDX-License-Identifier: Apache-2.0
"""Griffin (De et al. 2024, arXiv:2402.19427): two recurrent blocks with an RG-LRU to one of local attention, a gated
MLP behind each. Its published checkpoints are `recurrent_gemma:2b` and `recurrent_gemma:9b`.

Command: python train.py --config griffin:tiny
Hardware: two CPU cores.
Expected: 325,952 parameters.
"""

from hybridlm.config import MLP, RGLRU, Attention, Config, ModelConfig, Rope
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, layers=6, heads=4, window=33, **TINY),
}


def model(*, d: int, layers: int, heads: int, window: int, **other) -> ModelConfig:
    attention = Attention(heads, 1, d // heads, rope=Rope(fraction=0.5), window=window, out_bias=True)
    blocks = {"R": RGLRU(heads), "*": attention, "-": MLP(3 * d, "geglu_tanh", bias=True)}
    widths = {"d_model": d, "norm_eps": 1e-6, "embedding_multiplier": d**0.5, "logit_softcap": 30.0} | other
    return ModelConfig(**widths, norm_offset=1.0, pattern="R-R-*-" * (layers // 3), blocks=blocks)


def config(size: str) -> Config:
    return composed("griffin", size, model(**SIZES[size]))
