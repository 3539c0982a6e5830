# SPDX-License-Identifier: Apache-2.0
"""Inkling and Inkling-Small (Thinking Machines 2026), their text: one attention over all tokens to five over windows,
terms by distance in place of rotations, convolutions everywhere, 256 experts.

Command: python train.py --config inkling:small --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 4.2 and 15.2 TB.
Expected: 263,655,199,274 and 947,025,564,226 parameters, all rows of the head counted; 7 of 42 and 11 of 66
layers attend to all tokens, two have no experts. Layers that predict further tokens are left out.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "small": {
        "hidden_size": 4096, "num_hidden_layers": 42, "num_attention_heads": 32, "num_key_value_heads": 8,
        "swa_num_attention_heads": 32, "swa_num_key_value_heads": 8, "intermediate_size": 16_384,
        "moe_intermediate_size": 2048, "logits_mup_width_multiplier": 16.0,
    },
    "large": {
        "hidden_size": 6144, "num_hidden_layers": 66, "num_attention_heads": 64, "num_key_value_heads": 8,
        "swa_num_attention_heads": 64, "swa_num_key_value_heads": 16, "intermediate_size": 24_576,
        "moe_intermediate_size": 3072, "logits_mup_width_multiplier": 24.0,
    },
}  # fmt: skip
COMMON = {
    "model_type": "inkling_text", "vocab_size": 201_024, "head_dim": 128, "swa_head_dim": 128, "d_rel": 16,
    "rel_extent": 1024, "sliding_window_size": 512, "dense_mlp_idx": 2, "n_routed_experts": 256,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "route_scale": 8.0, "log_scaling_n_floor": 128_000,
    "log_scaling_alpha": 0.1,
}  # fmt: skip


def config(size: str) -> Config:
    return published("inkling", size, COMMON | SIZES[size])
