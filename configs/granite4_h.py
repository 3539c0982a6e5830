# SPDX-License-Identifier: Apache-2.0
"""Granite-4.0-H (IBM 2025): 36 Mamba-2 and 4 attention layers, no positions; tiny and small have experts.

Command: python train.py --config granite4_h:micro --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 51, 111 and 515 GB.
Expected: 3,191,396,096, 6,939,037,248 and 32,207,337,984 parameters.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "micro": {
        "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "mamba_n_heads": 64,
        "intermediate_size": 8192, "shared_intermediate_size": 8192, "num_local_experts": 0, "num_experts_per_tok": 0,
        "attention_multiplier": 0.015625, "logits_scaling": 8.0,
    },
    "tiny": {
        "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 4, "mamba_n_heads": 48,
        "intermediate_size": 512, "shared_intermediate_size": 1024, "num_local_experts": 64, "num_experts_per_tok": 6,
        "attention_multiplier": 0.0078125, "logits_scaling": 6.0,
    },
    "small": {
        "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "mamba_n_heads": 128,
        "intermediate_size": 768, "shared_intermediate_size": 1536, "num_local_experts": 72, "num_experts_per_tok": 10,
        "attention_multiplier": 0.0078125, "logits_scaling": 16.0,
    },
}  # fmt: skip
COMMON = {
    "model_type": "granitemoehybrid", "vocab_size": 100_352, "num_hidden_layers": 40,
    "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
    "position_embedding_type": "nope", "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "mamba_d_head": 64,
    "mamba_d_state": 128, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_conv_bias": True,
    "mamba_proj_bias": False, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def config(size: str) -> Config:
    return published("granite4_h", size, COMMON | SIZES[size])
