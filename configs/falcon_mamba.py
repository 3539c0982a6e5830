# SPDX-License-Identifier: Apache-2.0
"""Falcon-Mamba-7B (Zuo et al. 2024, "Falcon Mamba"): Mamba-1 with norms of dt, B and C.

Command: python train.py --config falcon_mamba:7b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: a pod; 116 GB over all devices for AdamW in float32, before activations.
Expected: 7,272,665,088 parameters; 64 Mamba-1 sublayers of inner width 8,192.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {"7b": {"hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 64, "time_step_rank": 256}}
COMMON = {
    "model_type": "falcon_mamba", "vocab_size": 65_024, "state_size": 16, "expand": 16, "conv_kernel": 4,
    "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def config(size: str) -> Config:
    return published("falcon_mamba", size, COMMON | SIZES[size])
