# SPDX-License-Identifier: Apache-2.0
"""Qwen3.8-Flash-Next (Qwen Team 2026), its text: four residual streams, three Gated DeltaNets to one attention that an
index chooses the keys of, 512 experts, and 320 million rows of hashed n-grams.

Command: python train.py --config qwen4_exp:flash-next --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 2.8 TB. Rows
of n-grams are 160 wide, which mesh.fsdp has to divide; mesh.tensor splits them by rows.
Expected: 176,943,899,520 parameters, 51,200,245,760 of them of the table of n-grams. Layers that predict further tokens
and the vision tower are left out. The index of the attention learns nothing from the loss.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "flash-next": {
        "hidden_size": 2560, "num_hidden_layers": 48, "num_attention_heads": 24, "num_key_value_heads": 2,
        "linear_num_key_heads": 16, "linear_num_value_heads": 48, "moe_intermediate_size": 640,
        "shared_expert_intermediate_size": 640, "num_experts": 512, "num_experts_per_tok": 10, "ple_embed_dim": 2560,
    },
}  # fmt: skip
COMMON = {
    "model_type": "qwen4_exp_text", "vocab_size": 248_320, "head_dim": 256, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "hidden_act": "silu", "output_gate_type": "sigmoid",
    "full_attention_interval": 4, "hc_count": 4, "hc_lowrank": 320, "indexer_n_heads": 4, "indexer_kv_heads": 1,
    "indexer_head_dim": 128, "indexer_budget": 2048, "indexer_compress_ratio": 4, "ple_layer_ids": [2],
    "ple_conv_kernel_size": 4, "ngram_size": 3, "heads_per_ngram": 8, "ngram_vocab_size_base": 20_000_000,
    "make_ngram_vocab_size_divisible_by": 128, "split_ngram_parts": 128, "eos_token_id": 248_044,
    "max_position_embeddings": 262_144, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25},
}  # fmt: skip


def config(size: str) -> Config:
    return published("qwen4_exp", size, COMMON | SIZES[size])
