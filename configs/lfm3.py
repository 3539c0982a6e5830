# SPDX-License-Identifier: Apache-2.0
"""LFM3-1.7B (Liquid AI): gated short convolutions, windowed attention and full attention, norms on both sides of each.

Command: python train.py --config lfm3:1.7b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 28 GB.
Expected: 1,728,801,536 parameters; of 24 layers 6 with full attention and 5 with windows.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "1.7b": {
        "hidden_size": 2048, "intermediate_size": 7680, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 128, "sliding_window": 256, "conv_L_cache": 7, "vocab_size": 128_000,
    },
}  # fmt: skip


def config(size: str) -> Config:
    return published("lfm3", size, {"model_type": "lfm3", "norm_eps": 1e-5} | SIZES[size])
