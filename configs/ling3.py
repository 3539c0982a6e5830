# SPDX-License-Identifier: Apache-2.0
"""Ling-3.0-Flash (inclusionAI 2026): 5 Kimi Delta Attention to 1 gated latent attention, 512 experts in 8 groups.

Command: python train.py --config ling3:flash --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: a pod; 2.0 TB over all devices for AdamW in float32, before activations.
Expected: 124,414,211,552 parameters; 7 attention layers of 42; experts in all layers but the first two, 8 a token and
one that all use.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {"flash": {}}
COMMON = {
    "model_type": "bailing_hybrid", "vocab_size": 157_184, "hidden_size": 2560, "intermediate_size": 6144,
    "num_hidden_layers": 42, "layer_group_size": 6, "num_attention_heads": 32, "num_key_value_heads": 32,
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "rope_theta": 6_000_000.0, "head_dim": 128, "short_conv_kernel_size": 4, "kda_safe_gate": True,
    "kda_lower_bound": -5.0, "first_k_dense_replace": 2, "num_experts": 512, "num_experts_per_token": 8,
    "num_shared_experts": 1, "moe_intermediate_size": 768, "moe_renormalize": True, "num_expert_group": 8,
    "topk_group": 4, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


def config(size: str) -> Config:
    return published("ling3", size, COMMON | SIZES[size])
