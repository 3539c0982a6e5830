# SPDX-License-Identifier: Apache-2.0
"""RecurrentGemma (Botev et al. 2024, arXiv:2404.07839): Griffin, two RG-LRU blocks to one of windowed attention.

Command: python train.py --config recurrent_gemma:2b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 43 and 137 GB.
Expected: 2,682,862,080 and 8,579,977,216 parameters; 8 and 12 attention layers of 26 and 38.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "2b": {
        "hidden_size": 2560, "intermediate_size": 15_360, "num_hidden_layers": 26, "num_attention_heads": 10,
        "lru_width": 2560,
    },
    "9b": {
        "hidden_size": 4096, "intermediate_size": 24_576, "num_hidden_layers": 38, "num_attention_heads": 16,
        "lru_width": 4096,
    },
}  # fmt: skip
COMMON = {
    "model_type": "recurrent_gemma", "vocab_size": 256_000, "num_key_value_heads": 1, "attention_window_size": 2048,
    "conv1d_width": 4, "block_types": ["recurrent", "recurrent", "attention"], "logits_soft_cap": 30.0,
}  # fmt: skip


def config(size: str) -> Config:
    return published("recurrent_gemma", size, COMMON | SIZES[size])
