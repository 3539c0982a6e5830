# SPDX-License-Identifier: Apache-2.0
"""LFM2 (Liquid AI 2025): gated short convolutions, and attention in a third of the layers or fewer; 8b-a1b has experts.

Command: python train.py --config lfm2:1.2b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 19 GB for 1.2b, 133 GB for
8b-a1b.
Expected: 354,483,968, 742,489,344, 1,170,340,608, 2,569,272,320 and 8,339,930,560 parameters.
"""

from hybridlm.config import Config
from hybridlm.config.published import published


def layer_types(n_layers: int, *attention: int) -> list[str]:
    """Attention in the layers that are named, convolutions in the others."""
    return ["full_attention" if i in attention else "conv" for i in range(n_layers)]


SHALLOW = layer_types(16, 2, 5, 8, 10, 12, 14)
SIZES = {
    "350m": {"hidden_size": 1024, "intermediate_size": 6656, "num_attention_heads": 16, "layer_types": SHALLOW},
    "700m": {"hidden_size": 1536, "intermediate_size": 10_240, "num_attention_heads": 24, "layer_types": SHALLOW},
    "1.2b": {"hidden_size": 2048, "intermediate_size": 12_288, "num_attention_heads": 32, "layer_types": SHALLOW},
    "2.6b": {
        "hidden_size": 2048, "intermediate_size": 10_752, "num_attention_heads": 32, "block_auto_adjust_ff_dim": False,
        "layer_types": layer_types(30, 2, 5, 9, 13, 17, 21, 24, 27),
    },
    "8b-a1b": {
        "model_type": "lfm2_moe", "hidden_size": 2048, "intermediate_size": 7168, "num_attention_heads": 32,
        "moe_intermediate_size": 1792, "num_experts": 32, "num_experts_per_tok": 4, "num_dense_layers": 2,
        "layer_types": layer_types(24, 2, 6, 10, 14, 18, 21),
    },
}  # fmt: skip
COMMON = {
    "model_type": "lfm2", "vocab_size": 65_536, "num_key_value_heads": 8, "conv_L_cache": 3, "norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
}  # fmt: skip


def config(size: str) -> Config:
    values = COMMON | SIZES[size]
    return published("lfm2", size, values | {"num_hidden_layers": len(values["layer_types"])})
