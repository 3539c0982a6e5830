# SPDX-License-Identifier: Apache-2.0
"""ZAYA1-8B (Zyphra 2025, arXiv:2511.17127): convolved attention and 16 experts, one a token or none, in 40 layers.

Command: python train.py --config zaya1:8b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 141 GB.
Expected: 8,840,489,464 parameters.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "8b": {
        "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 128, "moe_intermediate_size": 2048, "num_experts": 16, "router_hidden_size": 256,
    },
}  # fmt: skip


def config(size: str) -> Config:
    return published("zaya1", size, {"model_type": "zaya", "vocab_size": 262_272, "rms_norm_eps": 1e-5} | SIZES[size])
