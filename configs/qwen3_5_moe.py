# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5-MoE (Qwen Team 2026), the language models: as Qwen3.5, each mixer before experts, of which one is shared.

Command: python train.py --config qwen3_5_moe:35b-a3b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: a pod; 16 bytes a parameter for AdamW in float32, over all devices, before activations: 0.55, 2.0 and 6.3 TB.
Expected: 34,660,610,688, 122,111,526,912 and 396,346,350,336 parameters; a fourth of 40, 48 or 60 layers is attention.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "35b-a3b": {
        "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "linear_num_value_heads": 32,
        "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    "122b-a10b": {
        "hidden_size": 3072, "num_hidden_layers": 48, "num_attention_heads": 32, "linear_num_value_heads": 64,
        "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
    },
    "397b-a17b": {
        "hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32, "linear_num_value_heads": 64,
        "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
    },
}  # fmt: skip
COMMON = {
    "model_type": "qwen3_5_moe_text", "vocab_size": 248_320, "full_attention_interval": 4, "num_key_value_heads": 2,
    "head_dim": 256, "partial_rotary_factor": 0.25, "rope_theta": 10_000_000.0, "linear_num_key_heads": 16,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip


def config(size: str) -> Config:
    return published("qwen3_5_moe", size, COMMON | SIZES[size])
