# SPDX-License-Identifier: Apache-2.0
"""Jamba: 1 attention to 7 Mamba-1 layers, every second MLP a mixture of 16 experts, 2 a token.

52b is Jamba-v0.1 (Lieber et al. 2024, "Jamba") and Jamba-1.5-Mini, 398b is Jamba-1.5-Large (Jamba Team 2024).

Command: python train.py --config jamba:52b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: a pod; 0.83 and 6.4 TB over all devices for AdamW in float32, before activations.
Expected: 51,570,323,328 and 398,555,145,696 parameters; 4 and 9 attention layers of 32 and 72.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "52b": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "mamba_dt_rank": 256,
    },
    "398b": {
        "hidden_size": 8192, "intermediate_size": 24_576, "num_hidden_layers": 72, "num_attention_heads": 64,
        "mamba_dt_rank": 512,
    },
}  # fmt: skip
COMMON = {
    "model_type": "jamba", "vocab_size": 65_536, "num_key_value_heads": 8, "attn_layer_period": 8,
    "attn_layer_offset": 4, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 16,
    "num_experts_per_tok": 2, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True,
    "mamba_proj_bias": False, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


def config(size: str) -> Config:
    return published("jamba", size, COMMON | SIZES[size])
