# SPDX-License-Identifier: Apache-2.0
"""Kimi-Linear-48B-A3B (Kimi Team 2025, arXiv:2510.26692): 3 Kimi Delta Attention to 1 latent attention, 256 experts.

Command: python train.py --config kimi_linear:48b-a3b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: a pod; 0.79 TB over all devices for AdamW in float32, before activations.
Expected: 49,122,681,728 parameters; 7 attention layers of 27, without positions; experts in all layers but the first, 8
a token and one that all use.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

ATTENTION = (4, 8, 12, 16, 20, 24, 27)
SIZES = {"48b-a3b": {}}
COMMON = {
    "model_type": "kimi_linear", "vocab_size": 163_840, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 27, "num_attention_heads": 32, "num_key_value_heads": 32, "kv_lora_rank": 512,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "mla_use_nope": True,
    "linear_attn_config": {
        "full_attn_layers": list(ATTENTION), "kda_layers": [i for i in range(1, 28) if i not in ATTENTION],
        "num_heads": 32, "head_dim": 128, "short_conv_kernel_size": 4,
    },
    "first_k_dense_replace": 1, "num_experts": 256, "num_experts_per_token": 8, "num_shared_experts": 1,
    "moe_intermediate_size": 1024, "moe_renormalize": True, "moe_router_activation_func": "sigmoid",
    "num_expert_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip


def config(size: str) -> Config:
    return published("kimi_linear", size, COMMON | SIZES[size])
