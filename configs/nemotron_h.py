# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H (Blakeman et al. 2025, "Nemotron-H") and its relatives: Mamba-2, some attention without positions, MLPs.

mamba2-hybrid-8b is from Waleffe et al. 2024 ("An Empirical Study of Mamba-based Language Models"), its MLPs GELU;
3-nano-30b-a3b is Nemotron-3-Nano (NVIDIA 2025), its MLPs mixtures of 128 experts, 6 a token.

Command: python train.py --config nemotron_h:8b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: a pod; 0.13, 0.75, 0.9, 0.14 and 0.5 TB over all devices for AdamW in float32, before activations.
Expected: 8,100,852,736, 46,791,554,816, 56,324,350,464, 8,654,517,248 and 31,577,940,288 parameters.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "8b": {
        "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 21_504, "mamba_num_heads": 128,
        "hybrid_override_pattern": "M-M-M-M*-" + "M-M-M-M-M*-" * 3 + "M-M-M-M-M-",
    },
    "47b": {
        "hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 30_720, "mamba_num_heads": 256,
        "ssm_state_size": 256,
        "hybrid_override_pattern": "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-"
        "M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
    },
    "56b": {
        "hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 32_768, "mamba_num_heads": 256,
        "ssm_state_size": 256, "hybrid_override_pattern": "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-",
    },
    "mamba2-hybrid-8b": {
        "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 16_384, "mamba_num_heads": 128,
        "hybrid_override_pattern": "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-",
        "mlp_hidden_act": "gelu", "vocab_size": 256_000,
    },
    "3-nano-30b-a3b": {
        "hidden_size": 2688, "num_attention_heads": 32, "num_key_value_heads": 2, "mamba_num_heads": 64,
        "intermediate_size": 1856, "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712,
        "n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "hybrid_override_pattern": "MEMEM*E" * 5 + "MEMEMEM*EMEMEMEME",
    },
}  # fmt: skip
COMMON = {
    "model_type": "nemotron_h", "vocab_size": 131_072, "num_key_value_heads": 8, "head_dim": 128, "mamba_head_dim": 64,
    "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "mlp_hidden_act": "relu2", "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip


def config(size: str) -> Config:
    values = COMMON | SIZES[size]
    return published("nemotron_h", size, values | {"num_hidden_layers": len(values["hybrid_override_pattern"])})
