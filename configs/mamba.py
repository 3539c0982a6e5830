# SPDX-License-Identifier: Apache-2.0
"""Mamba (Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"), the published sizes.

Command: python train.py --config mamba:130m --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 2 to 44 GB.
Expected: 129,135,360, 371,516,416, 793,204,224, 1,372,178,432 and 2,768,345,600 parameters; 24, 48, 48, 48 and 64
Mamba-1 sublayers and nothing else.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "130m": {"hidden_size": 768, "num_hidden_layers": 24},
    "370m": {"hidden_size": 1024, "num_hidden_layers": 48},
    "790m": {"hidden_size": 1536, "num_hidden_layers": 48},
    "1.4b": {"hidden_size": 2048, "num_hidden_layers": 48},
    "2.8b": {"hidden_size": 2560, "num_hidden_layers": 64},
}
COMMON = {
    "model_type": "mamba", "vocab_size": 50_280, "state_size": 16, "expand": 2, "conv_kernel": 4,
    "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def config(size: str) -> Config:
    return published("mamba", size, COMMON | SIZES[size])
