# SPDX-License-Identifier: Apache-2.0
"""Bamba-9B (IBM, Princeton, CMU and UIUC 2024), first and second version: 29 Mamba-2 and 3 attention layers.

Command: python train.py --config bamba:9b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: a pod; 156 GB over all devices for AdamW in float32, before activations.
Expected: 9,780,235,392 parameters; attention, its heads half rotated, in the layers 9, 18 and 27.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "9b": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "attn_layer_indices": [9, 18, 27],
        "num_attention_heads": 32, "num_key_value_heads": 8, "mamba_n_heads": 128, "mamba_d_head": 64,
    }
}  # fmt: skip
COMMON = {
    "model_type": "bamba", "vocab_size": 128_256, "mamba_n_groups": 1, "mamba_d_state": 128, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}  # fmt: skip


def config(size: str) -> Config:
    return published("bamba", size, COMMON | SIZES[size])
