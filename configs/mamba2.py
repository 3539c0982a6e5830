# SPDX-License-Identifier: Apache-2.0
"""Mamba-2 (Dao and Gu 2024, "Transformers are SSMs"), the published sizes.

Command: python train.py --config mamba2:130m --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 2 to 43 GB.
Expected: 128,989,632, 368,346,624, 780,161,280, 1,343,757,312 and 2,702,599,680 parameters; 24, 48, 48, 48 and 64
Mamba-2 sublayers and nothing else; the vocabulary of 50,277 is padded to a multiple of 16.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "130m": {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24},
    "370m": {"hidden_size": 1024, "num_hidden_layers": 48, "num_heads": 32},
    "780m": {"hidden_size": 1536, "num_hidden_layers": 48, "num_heads": 48},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 48, "num_heads": 64},
    "2.7b": {"hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80},
}
COMMON = {
    "model_type": "mamba2", "vocab_size": 50_288, "state_size": 128, "head_dim": 64, "n_groups": 1, "expand": 2,
    "conv_kernel": 4, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def config(size: str) -> Config:
    return published("mamba2", size, COMMON | SIZES[size])
