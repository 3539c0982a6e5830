# SPDX-License-Identifier: Apache-2.0
"""Zamba-7B-v1 (Glorioso et al. 2024, "Zamba"): Mamba-1 with one attention and MLP block shared by 13 depths.

Command: python train.py --config zamba:7b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: a pod; 116 GB over all devices for AdamW in float32, before activations.
Expected: 7,232,490,496 parameters; 76 Mamba-1 layers of 2 heads.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "7b": {
        "hidden_size": 3712, "intermediate_size": 14_848, "num_hidden_layers": 76, "attn_layer_period": 6,
        "attn_layer_offset": 4, "num_attention_heads": 16, "n_mamba_heads": 2, "mamba_dt_rank": 232,
    }
}  # fmt: skip
COMMON = {
    "model_type": "zamba", "vocab_size": 32_000, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_conv_bias": True, "mamba_proj_bias": False, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def config(size: str) -> Config:
    return published("zamba", size, COMMON | SIZES[size])
