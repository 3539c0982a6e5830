# SPDX-License-Identifier: Apache-2.0
"""Olmo-Hybrid-7B (Ai2 2026): 3 Gated DeltaNet, whose states can be reflected, to 1 attention without positions.

Command: python train.py --config olmo_hybrid:7b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 119 GB over all devices for AdamW in float32, before activations.
Expected: 7,430,870,688 parameters; 8 attention layers of 32, normed behind their mixers.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {"7b": {}}
COMMON = {
    "model_type": "olmo_hybrid", "vocab_size": 100_352, "hidden_size": 3840, "intermediate_size": 11_008,
    "num_hidden_layers": 32, "num_attention_heads": 30, "num_key_value_heads": 30, "rope_parameters": None,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 8,
    "linear_num_key_heads": 30, "linear_num_value_heads": 30, "linear_key_head_dim": 96, "linear_value_head_dim": 192,
    "linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": True, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


def config(size: str) -> Config:
    return published("olmo_hybrid", size, COMMON | SIZES[size])
