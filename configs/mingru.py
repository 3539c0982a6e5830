# SPDX-License-Identifier: Apache-2.0
"""minGRU (Feng et al. 2024, "Were RNNs All We Needed?", arXiv:2410.01201): a convolution of four tokens, minGRU, MLP.

The second size is that of the paper's language model of Shakespeare's characters, here of bytes.

Command: python train.py --config mingru:tiny
Hardware: tiny, two CPU cores; shakespeare, one GPU or a few minutes more.
Expected: 6,324,480 parameters.
"""

from hybridlm.config import MLP, Config, GatedScan, ModelConfig
from hybridlm.config.composed import TINY, composed

SIZES = {
    "tiny": dict(d=64, layers=2, ff=128, **TINY),
    "shakespeare": dict(d=384, layers=3, ff=1536, vocab_size=320),
}


def model(*, d: int, layers: int, ff: int, **other) -> ModelConfig:
    widths = {"d_model": d, "tie_embeddings": True} | other
    blocks = {"G": GatedScan("mingru", expand=2.0, d_conv=4), "-": MLP(ff, "gelu")}
    return ModelConfig(**widths, pattern="G-" * layers, blocks=blocks)


def config(size: str) -> Config:
    return composed("mingru", size, model(**SIZES[size]))
