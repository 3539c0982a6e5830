# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5 (Qwen Team 2026), the language models: 3 Gated DeltaNet to 1 gated attention, each before a SwiGLU.

Command: python train.py --config qwen3_5:0.8b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 12, 30, 67, 143 and 430 GB.
Expected: 752,393,024, 1,881,825,088, 4,205,751,296, 8,953,803,264 and 26,895,998,464 parameters; a fourth of 24 (0.8b,
2b), 32 or 64 layers is attention.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "0.8b": {
        "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 3584, "num_attention_heads": 8,
        "num_key_value_heads": 2, "linear_num_value_heads": 16, "tie_word_embeddings": True,
    },
    "2b": {
        "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 6144, "num_attention_heads": 8,
        "num_key_value_heads": 2, "linear_num_value_heads": 16, "tie_word_embeddings": True,
    },
    "4b": {
        "hidden_size": 2560, "num_hidden_layers": 32, "intermediate_size": 9216, "num_attention_heads": 16,
        "num_key_value_heads": 4, "linear_num_value_heads": 32, "tie_word_embeddings": True,
    },
    "9b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 12_288, "num_attention_heads": 16,
        "num_key_value_heads": 4, "linear_num_value_heads": 32, "tie_word_embeddings": False,
    },
    "27b": {
        "hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 17_408, "num_attention_heads": 24,
        "num_key_value_heads": 4, "linear_num_value_heads": 48, "tie_word_embeddings": False,
    },
}  # fmt: skip
COMMON = {
    "model_type": "qwen3_5_text", "vocab_size": 248_320, "full_attention_interval": 4, "head_dim": 256,
    "partial_rotary_factor": 0.25, "rope_theta": 10_000_000.0, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6,
}  # fmt: skip


def config(size: str) -> Config:
    return published("qwen3_5", size, COMMON | SIZES[size])
