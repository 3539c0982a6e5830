# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Next-80B-A3B (Qwen Team 2025): 3 Gated DeltaNet to 1 gated attention, 512 experts in every layer, 10 a token.

Command: python train.py --config qwen3_next:80b-a3b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: a pod; 1.3 TB over all devices for AdamW in float32, before activations.
Expected: 79,674,391,296 parameters; 12 attention layers of 48.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {"80b-a3b": {}}
COMMON = {
    "model_type": "qwen3_next", "vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 48,
    "full_attention_interval": 4, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
    "partial_rotary_factor": 0.25, "rope_theta": 10_000_000.0, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 512,
    "num_experts_per_tok": 10, "norm_topk_prob": True, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "intermediate_size": 5120, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip


def config(size: str) -> Config:
    return published("qwen3_next", size, COMMON | SIZES[size])
