# SPDX-License-Identifier: Apache-2.0
"""xLSTM[7:1] (Beck et al. 2024, arXiv:2405.04517): seven blocks of mLSTM to one of sLSTM.

Command: python train.py --config xlstm_7_1:tiny
Hardware: two CPU cores.
Expected: 303,004 parameters.
"""

from hybridlm.config import MLP, MLSTM, SLSTM, Config, ModelConfig
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, heads=2, **TINY),
}


def model(*, d: int, heads: int, **other) -> ModelConfig:
    blocks = {
        "X": MLSTM(heads, d // heads // 2, d // heads),
        "s": SLSTM(heads),
        "-": MLP(-(-4 * d // 3 // 32) * 32, "geglu"),
    }
    widths = {"d_model": d, "norm_eps": 1e-6} | other
    return ModelConfig(**widths, pattern="X-X-X-s-X-X-X-X-", blocks=blocks)


def config(size: str) -> Config:
    return composed("xlstm_7_1", size, model(**SIZES[size]))
