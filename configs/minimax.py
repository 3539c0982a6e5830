# SPDX-License-Identifier: Apache-2.0
"""MiniMax-Text-01 (MiniMax 2025, arXiv:2501.08313): seven layers of lightning attention for each of attention, a
mixture of 32 experts behind each.

Command: python train.py --config minimax:456b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 7,300 GB.
Expected: 456,089,659,776 parameters, 4,480 slopes of decays among them that are not trained; a token uses 46 billion.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "456b": {
        "model_type": "minimax", "vocab_size": 200_064, "hidden_size": 6144, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 9216,
        "num_local_experts": 32, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 10_000_000.0, "rotary_dim": 64,
        "layer_types": [*["linear_attention"] * 7, "full_attention"] * 10, "tie_word_embeddings": False,
        **{f"{name}_alpha_factor": 3.5565588200778455 for name in ("linear_attn", "full_attn", "mlp")},
    }
}  # fmt: skip


def config(size: str) -> Config:
    return published("minimax", size, SIZES[size])
