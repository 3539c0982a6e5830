# SPDX-License-Identifier: Apache-2.0
"""Hunyuan dense 0.5B to 7B (Tencent 2025): grouped-query attention, heads normed behind the rotation, and MLPs.

Command: python train.py --config hunyuan:1.8b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 9, 29, 68 and 120 GB.
Expected: 539,010,048, 1,791,080,448, 4,221,757,440 and 7,504,568,320 parameters.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "0.5b": {
        "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": 120_818,
    },
    "1.8b": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 32, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 120_818,
    },
    "4b": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 120_818,
    },
    "7b": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_167,
    },
}  # fmt: skip
COMMON = {
    "model_type": "hunyuan_v1_dense", "head_dim": 128, "max_position_embeddings": 262_144, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "rope_theta": 10_000.0,
    "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
}  # fmt: skip


def config(size: str) -> Config:
    return published("hunyuan", size, COMMON | SIZES[size])
