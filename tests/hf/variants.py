# SPDX-License-Identifier: Apache-2.0
"""Configurations that the golden checkpoints do not show: options of each family's published config class."""

WIDTHS = {"vocab_size": 48, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **WIDTHS, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40,
    "max_position_embeddings": 64,
}  # fmt: skip
PREFIXED = {
    **LLAMA, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 2, "mamba_chunk_size": 8,
}  # fmt: skip
MAMBA2 = {
    **WIDTHS, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 6, "n_groups": 2, "chunk_size": 8,
}  # fmt: skip
GRANITE = {**PREFIXED, "num_local_experts": 0, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"]}
NEMOTRON = {
    **WIDTHS, "layers_block_type": ["mamba", "mlp", "attention", "mamba"], "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 40, "mamba_num_heads": 6, "mamba_head_dim": 8,
    "ssm_state_size": 6, "n_groups": 2, "chunk_size": 8, "time_step_min": 1e-12,
}  # fmt: skip
FALCON = {**PREFIXED, "mamba_d_ssm": 48, "mamba_n_heads": 6, "projectors_bias": False}
ZAMBA2 = {
    **WIDTHS, "num_hidden_layers": 6, "layers_block_type": ["hybrid", "mamba", "hybrid", "mamba", "hybrid", "hybrid"],
    "num_attention_heads": 4, "intermediate_size": 40, "mamba_d_state": 6, "n_mamba_heads": 8, "mamba_ngroups": 2,
    "adapter_rank": 3, "num_mem_blocks": 2, "chunk_size": 8, "time_step_min": 1e-12,
}  # fmt: skip
ZAMBA = {
    **WIDTHS, "num_hidden_layers": 5, "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid"],
    "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 40, "mamba_d_state": 6,
    "mamba_dt_rank": 3, "n_mamba_heads": 2,
}  # fmt: skip

QWEN_DELTA = {
    **LLAMA, "num_hidden_layers": 4, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
QWEN_NEXT = {
    **QWEN_DELTA, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}  # fmt: skip
OLMO = {**LLAMA, "num_hidden_layers": 4, "num_key_value_heads": None}
KIMI = {
    **WIDTHS, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": None, "intermediate_size": 40,
    "moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_token": 2, "kv_lora_rank": 16,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4,
}  # fmt: skip
LING = {
    **{key: value for key, value in KIMI.items() if not key.startswith("linear_")}, "num_hidden_layers": 4,
    "head_dim": 8, "layer_group_size": 2, "first_k_dense_replace": 1, "num_expert_group": 3, "topk_group": 2,
}  # fmt: skip
MAMBA = {**WIDTHS, "num_hidden_layers": 2, "state_size": 6}
JAMBA = {
    **WIDTHS, "num_hidden_layers": 5, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "mamba_d_state": 6, "num_experts": 6, "attn_layer_period": 3, "attn_layer_offset": 1,
}  # fmt: skip
GRANITE_MOE = {**GRANITE, "num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 12}
NEMOTRON_MOE = {
    **NEMOTRON, "layers_block_type": ["mamba", "moe", "attention", "moe"], "n_routed_experts": 8,
    "num_experts_per_tok": 3, "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 20,
}  # fmt: skip
LFM2 = {
    **WIDTHS, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 60,
    "block_multiple_of": 8, "layer_types": ["conv", "full_attention", "conv"],
}  # fmt: skip
LFM2_MOE = {
    **WIDTHS, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
    "moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3, "num_dense_layers": 1,
    "layer_types": ["full_attention", "conv", "conv"],
}  # fmt: skip
LFM3 = {
    **WIDTHS, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 24, "sliding_window": 4,
}  # fmt: skip
GRIFFIN = {
    **WIDTHS, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 48,
}  # fmt: skip
RWKV = {**WIDTHS, "num_hidden_layers": 2, "intermediate_size": 56}
XLSTM = {
    **WIDTHS, "num_hidden_layers": 2, "num_heads": 4, "ffn_round_up_to_multiple_of": 8,
    "autocast_kernel_dtype": "float32",
}  # fmt: skip
MINIMAX = {
    **LLAMA, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
    "intermediate_size": 12, "block_size": 8,
}  # fmt: skip
INKLING = {
    **WIDTHS, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "swa_head_dim": 12, "sliding_window_size": 5,
    "d_rel": 4, "rel_extent": 7, "intermediate_size": 40, "moe_intermediate_size": 12, "n_routed_experts": 5,
    "num_experts_per_tok": 2, "layer_types": ["hybrid_sliding", "hybrid", "hybrid"],
    "mlp_layer_types": ["dense", "sparse", "sparse"], "logits_mup_width_multiplier": 3.0,
}  # fmt: skip
QWEN4 = {
    **QWEN_DELTA, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20, "hc_count": 2, "hc_lowrank": 5, "ple_layer_ids": [2],
    "ngram_vocab_size_base": 30, "heads_per_ngram": 2, "make_ngram_vocab_size_divisible_by": 4, "split_ngram_parts": 2,
    "indexer_n_heads": 6, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 6,
    "indexer_compress_ratio": 2, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25},
    "pad_token_id": None,
}  # fmt: skip
ZAYA = {
    **WIDTHS, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "moe_intermediate_size": 12, "num_experts": 3, "router_hidden_size": 10,
}  # fmt: skip


def rope(kind: str, **values) -> dict:
    """rope_parameters of a type."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, list[tuple[dict, dict]]] = {
    "llama": [
        (LLAMA, change)
        for change in (
            {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
            {"head_dim": 12, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
            {"num_key_value_heads": None, "hidden_act": "gelu"},
            {"hidden_act": "gelu_pytorch_tanh", **rope("linear", factor=4.0)},
            {"hidden_act": "relu", **LLAMA3},
            rope("yarn", **YARN),
            rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.3, truncate=False),
            rope("yarn", **YARN, attention_factor=1.5, beta_fast=8, beta_slow=2),
            {"num_hidden_layers": 1, "intermediate_size": 7},
        )
    ],
    "qwen2": [
        (LLAMA, change)
        for change in (
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3},
            {
                "use_sliding_window": True, "sliding_window": 3, "num_hidden_layers": 3,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            {"tie_word_embeddings": True, "num_key_value_heads": 4, **LLAMA3},
        )
    ],
    "qwen3": [
        (LLAMA, change)
        for change in (
            {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
            {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            {"head_dim": 8, **rope("yarn", factor=2.0)},
        )
    ],
    "mamba": [
        (MAMBA, change)
        for change in (
            {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "hidden_act": "gelu", "expand": 3},
            {"intermediate_size": 40, "hidden_act": "relu", "time_step_rank": 5, "layer_norm_epsilon": 1e-2},
            {"tie_word_embeddings": False, "residual_in_fp32": False, "conv_kernel": 2, "state_size": 1},
        )
    ],
    "falcon_mamba": [
        (MAMBA, change)
        for change in (
            {"mixer_rms_eps": 1e-2, "intermediate_size": 40, "expand": 16, "hidden_act": "gelu_pytorch_tanh"},
            {"use_bias": True, "tie_word_embeddings": False, "use_conv_bias": False, "time_step_rank": 3},
        )
    ],
    "jamba": [
        (JAMBA, change)
        for change in (
            {"num_experts_per_tok": 3, "expert_layer_period": 3, "expert_layer_offset": 0, "mamba_d_conv": 3},
            {"mamba_proj_bias": True, "mamba_conv_bias": False, "hidden_act": "gelu", "tie_word_embeddings": True},
            {"num_experts": 1, "attn_layer_period": 8, "attn_layer_offset": 6, "hidden_act": "relu"},
            {"expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1, "attn_layer_offset": 0},
            {"mamba_dt_rank": 5, "mamba_expand": 3, "rms_norm_eps": 1e-2, "num_key_value_heads": 4, "head_dim": 6},
        )
    ],
    "mamba2": [
        (MAMBA2, change)
        for change in (
            {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu"},
            {"n_groups": 4, "time_step_limit": (0.1, 0.5), "conv_kernel": 3},
            {"n_groups": 8, "num_heads": 16, "head_dim": 4, "layer_norm_epsilon": 1e-2, "chunk_size": 5},
            {"expand": 3, "num_heads": 6, "head_dim": 16, "conv_kernel": 2, "state_size": 16},
            {"expand": 1, "num_heads": 2, "head_dim": 16, "n_groups": 1, "num_hidden_layers": 1},
        )
    ],
    "bamba": [
        (PREFIXED, change)
        for change in (
            {"attn_layer_indices": [0], "attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True},
            {"attn_layer_indices": [1, 2], "num_hidden_layers": 4, "mamba_conv_bias": False, "mamba_d_conv": 3},
            {"attn_layer_indices": [], "tie_word_embeddings": True, "mamba_d_head": "auto", "mamba_n_heads": 4},
            {"attn_layer_indices": [0], "head_dim": 12, "hidden_act": "gelu_pytorch_tanh"},
            {"attn_layer_indices": [1], "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
            {"attn_layer_indices": [0], "head_dim": 16, "time_step_limit": (0.2, 0.4), "rms_norm_eps": 1e-2},
            {"attn_layer_indices": None, "mamba_expand": 3, "mamba_n_heads": 12, "mamba_n_groups": 4},
        )
    ],
    "granitemoehybrid": [
        (GRANITE, change)
        for change in (
            {"position_embedding_type": "rope", "attention_bias": True, "tie_word_embeddings": True},
            {"embedding_multiplier": 3, "logits_scaling": 49, "residual_multiplier": 0.3, "attention_multiplier": 0.2},
            {"layer_types": ["attention", "attention"], "position_embedding_type": "rope", **LLAMA3},
            {"layer_types": None, "mamba_proj_bias": True, "hidden_act": "relu", "mamba_conv_bias": False},
            {"time_step_limit": (0.1, 0.3), "mamba_d_head": "auto", "mamba_n_heads": 16, "head_dim": 10},
            {"num_hidden_layers": 4, "layer_types": ["attention", "mamba", "mamba", "attention"], "mamba_d_conv": 2},
        )
    ] + [
        (GRANITE_MOE, change)
        for change in (
            {"residual_multiplier": 0.3, "position_embedding_type": "rope", "tie_word_embeddings": True},
            {"num_experts_per_tok": 1, "num_local_experts": 3, "shared_intermediate_size": 7},
            {"num_experts_per_tok": 6, "layer_types": ["mamba", "mamba"]},
        )
    ],
    "nemotron_h": [
        (NEMOTRON, change)
        for change in (
            {"use_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
            {"use_conv_bias": False, "n_groups": 3, "mlp_hidden_act": "gelu", "layer_norm_epsilon": 1e-2},
            {"layers_block_type": ["attention", "attention", "mlp"], "mlp_hidden_act": "silu"},
            {"layers_block_type": ["mlp", "mamba"], "conv_kernel": 3, "mamba_head_dim": 4, "expand": 5},
            {"hybrid_override_pattern": "M*M--*", "layers_block_type": None, "num_key_value_heads": 1},
            {"layers_block_type": ["mamba"] * 3, "mamba_hidden_act": "relu"},
        )
    ] + [
        (NEMOTRON_MOE, change)
        for change in (
            {"moe_latent_size": 16, "mlp_bias": True, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
            {"norm_topk_prob": False, "mlp_hidden_act": "silu", "n_shared_experts": 2, "moe_latent_size": 8},
            {"num_experts_per_tok": 8, "layers_block_type": ["moe", "mlp"], "mlp_hidden_act": "gelu"},
            {"hybrid_override_pattern": "ME*-E", "layers_block_type": None, "n_group": 2, "topk_group": 1},
        )
    ],
    "falcon_h1": [
        (FALCON, change)
        for change in (
            {"mamba_rms_norm": True, "mamba_norm_before_gate": True, "attention_bias": True},
            {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mlp_bias": True, "tie_word_embeddings": True},
            {"mamba_d_ssm": None, "mamba_n_heads": 8, "projectors_bias": True, "mamba_conv_bias": False},
            {"mamba_d_ssm": None, "mamba_n_heads": 8, "mamba_proj_bias": True, "mamba_d_conv": 3, "head_dim": 10},
            {
                "ssm_multipliers": [0.3, 1.2, 0.8, 1.5, 0.7], "mlp_multipliers": [0.9, 0.5], "key_multiplier": 0.4,
                "attention_in_multiplier": 1.1, "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.3,
                "ssm_out_multiplier": 0.6, "embedding_multiplier": 5.6, "lm_head_multiplier": 0.04,
                "mamba_rms_norm": True,
            },
            {"time_step_limit": (0.05, 0.4), "mamba_n_groups": 3, "num_key_value_heads": None, **LLAMA3},
            {"hidden_act": "gelu"},
            {"mamba_proj_bias": True, "projectors_bias": True, "mamba_d_head": "auto", **rope("linear", factor=2.0)},
        )
    ],
    "zamba2": [
        (ZAMBA2, change)
        for change in (
            {"use_shared_attention_adapter": True, "use_mem_rope": True, "add_bias_linear": True},
            {"num_mem_blocks": 1, "hidden_act": "silu", "num_key_value_heads": 2},
            {"num_mem_blocks": 3, "use_mem_rope": True, "mamba_expand": 3, "mamba_d_conv": 3},
            {"use_mem_rope": True, "time_step_min": 0.3, "num_attention_heads": 2, "intermediate_size": None},
            {"layers_block_type": ["mamba"] * 3 + ["hybrid"] + ["mamba"] * 2, "use_mem_rope": True, **LLAMA3},
        )
    ],
    "qwen3_next": [
        (QWEN_NEXT, change)
        for change in (
            {"attention_bias": True, "tie_word_embeddings": True, "linear_num_key_heads": 4, "hidden_act": "gelu"},
            {"linear_num_value_heads": 6, "linear_num_key_heads": 2, "linear_value_head_dim": 6, "rms_norm_eps": 1e-2},
            {"mlp_only_layers": [0, 2], "linear_conv_kernel_dim": 3, "norm_topk_prob": False, "num_key_value_heads": 1},
            {"decoder_sparse_step": 2, "layer_types": ["full_attention", "linear_attention"] * 2, "head_dim": 8},
            {"num_experts": 0, "hidden_act": "relu", **rope("yarn", **YARN, partial_rotary_factor=0.5)},
            {"num_hidden_layers": 5, "num_experts_per_tok": 4, "linear_key_head_dim": 3, **rope("default")},
        )
    ],
    "qwen3_5_text": [
        (QWEN_DELTA, change)
        for change in (
            {"attention_bias": True, "tie_word_embeddings": True, "linear_num_key_heads": 4, "hidden_act": "gelu"},
            {"linear_num_value_heads": 6, "linear_value_head_dim": 6, "linear_key_head_dim": 5, "rms_norm_eps": 1e-2},
            {"layer_types": ["full_attention", "linear_attention"] * 2, "head_dim": 8, "linear_conv_kernel_dim": 2},
            {"num_hidden_layers": 5, "num_key_value_heads": 1, **rope("default", mrope_section=[1, 1, 0])},
            {"num_key_value_heads": 4, **rope("linear", factor=4.0, partial_rotary_factor=0.5)},
        )
    ],
    "qwen3_5_moe_text": [
        (QWEN_NEXT, change)
        for change in (
            {"num_experts_per_tok": 6, "shared_expert_intermediate_size": 7, "tie_word_embeddings": True},
            {"num_experts": 3, "linear_num_value_heads": 2, "hidden_act": "relu", "attention_bias": True},
        )
    ],
    "olmo_hybrid": [
        (OLMO, change)
        for change in (
            {"linear_allow_neg_eigval": False, "num_key_value_heads": 2, **rope("default")},
            {"rope_parameters": {"rope_type": "default", "rope_theta": None}, "linear_num_key_heads": 2},
            {"attention_bias": True, "tie_word_embeddings": True, "linear_key_head_dim": 5, "rms_norm_eps": 1e-2},
            {"layer_types": ["full_attention", "linear_attention", "full_attention"], "num_hidden_layers": 3, **LLAMA3},
            {"num_hidden_layers": 2, "linear_value_head_dim": 7, "linear_conv_kernel_dim": 3, "hidden_act": "gelu"},
        )
    ],
    "kimi_linear": [
        (KIMI, change)
        for change in (
            {"q_lora_rank": 10, "attention_bias": True, "routed_scaling_factor": 0.7, "rms_norm_eps": 1e-2},
            {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 3, "n_shared_experts": 2, "norm_topk_prob": False},
            {"mlp_layer_types": ["sparse", "dense"] * 2 + ["sparse"], "qk_nope_head_dim": 6, "v_head_dim": 10},
            {"layer_types": ["full_attention", "linear_attention"], "num_hidden_layers": 2, "hidden_act": "relu"},
            {"linear_num_heads": 2, "linear_head_dim": 6, "linear_conv_kernel_dim": 3, "num_attention_heads": 3,
             "num_key_value_heads": 3},
            {"mlp_layer_types": ["dense"] * 5, "kv_lora_rank": 7, "hidden_act": "gelu"},
            {"num_hidden_layers": 3, "linear_attn_config": {
                "kda_layers": [1, 3], "full_attn_layers": [2], "num_heads": 2, "head_dim": 8,
                "short_conv_kernel_size": 4,
            }},
        )
    ],
    "bailing_hybrid": [
        (LING, change)
        for change in (
            {"q_lora_rank": 10, "attention_bias": True, "kda_lower_bound": -2.5, "rms_norm_eps": 1e-2},
            {"kda_safe_gate": False, "num_expert_group": 1, "topk_group": 1, "num_experts_per_token": 5},
            {"layer_group_size": 3, "num_hidden_layers": 5, "first_k_dense_replace": 2, "moe_renormalize": False},
            {"num_shared_experts": 2, "qk_nope_head_dim": 6, "v_head_dim": 10, "short_conv_kernel_size": 3},
            {"mlp_layer_types": ["sparse", "dense", "sparse", "dense"], "rope_theta": 700.0, "head_dim": 6},
            rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.3),
            rope("yarn", **YARN, mscale_all_dim=1.2),
            rope("linear", factor=2.0),
        )
    ],
    "zamba": [
        (ZAMBA, change)
        for change in (
            {"mamba_conv_bias": False, "mamba_proj_bias": True, "hidden_act": "silu", "n_mamba_heads": 4},
            {"n_mamba_heads": 1, "mamba_dt_rank": "auto", "num_key_value_heads": 2, "attention_head_dim": 6},
            {"layers_block_type": None, "num_hidden_layers": 8, "attn_layer_period": 3, "attn_layer_offset": 1},
            {"hidden_mamba_act": "gelu", "mamba_d_conv": 3, "mamba_expand": 3, "rms_norm_eps": 1e-2},
        )
    ],
    "lfm2": [
        (LFM2, change)
        for change in (
            {"conv_bias": True, "conv_L_cache": 4, "tie_word_embeddings": False, "block_ffn_dim_multiplier": 1.3},
            {"block_auto_adjust_ff_dim": False, "norm_eps": 1e-2, "num_key_value_heads": 1},
            {"block_ffn_dim_multiplier": 2, "layer_types": None, "full_attn_idxs": [0, 2], "head_dim": 6},
            {"layer_types": None, "num_hidden_layers": 2, "conv_L_cache": 2, **rope("yarn", **YARN)},
            {"layer_types": ["conv"] * 3, "conv_L_cache": 1},
        )
    ],
    "lfm2_moe": [
        (LFM2_MOE, change)
        for change in (
            {"use_expert_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 2.5, "conv_bias": True},
            {"num_dense_layers": 0, "num_experts_per_tok": 1, "tie_word_embeddings": False, **LLAMA3},
            {"num_dense_layers": 2, "layer_types": ["conv"] * 3, "num_experts_per_tok": 6, "norm_eps": 1e-2},
        )
    ],
    "lfm3": [
        (LFM3, change)
        for change in (
            {"norm_eps": 1e-2},
            {"use_sandwich_norm": False, "use_attention_gate": False, "attention_bias": True, "conv_L_cache": 3},
            {
                "num_hidden_layers": 2, "layer_types": ["sliding_attention", "conv"], "conv_bias": True,
                "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0}},
            },
            {
                "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": False,
                "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
            },
            {
                "num_hidden_layers": 2, "layer_types": ["full_attention", "conv"], "head_dim": 12,
                "rope_parameters": {
                    "full_attention": {
                        "rope_type": "proportional", "rope_theta": 50.0, "partial_rotary_factor": 0.7, "factor": 2.0,
                    },
                },
            },
        )
    ],
    "recurrent_gemma": [
        (GRIFFIN, change)
        for change in (
            {"lru_width": 48, "conv1d_width": 3, "attention_bias": True, "logits_soft_cap": 5.0},
            {"block_types": ["attention", "recurrent"], "hidden_activation": "gelu", "num_key_value_heads": None},
            {"block_types": ["recurrent"], "tie_word_embeddings": False, "rms_norm_eps": 1e-2},
            {"num_attention_heads": 2, "num_hidden_layers": 4, **rope("default", partial_rotary_factor=0.25)},
        )
    ],
    "rwkv": [
        (RWKV, change)
        for change in (
            {"attention_hidden_size": 40, "layer_norm_epsilon": 1e-3, "rescale_every": 0},
            {"tie_word_embeddings": True, "rescale_every": 2},
            {"num_hidden_layers": 3, "intermediate_size": None, "context_length": 8},
        )
    ],
    "xlstm": [
        (XLSTM, change)
        for change in (
            {"use_bias": True, "qk_dim_factor": 1.0, "norm_eps": 1e-3},
            {"v_dim_factor": 2.0, "num_heads": 2, "gate_soft_cap": 3.0, "output_logit_soft_cap": 5.0, "chunk_size": 16},
            {"ffn_proj_factor": 1.5, "ffn_round_up_to_multiple_of": 7, "eps": 1e-2, "tie_word_embeddings": True},
        )
    ],
    "minimax": [
        (MINIMAX, change)
        for change in (
            {"layer_types": None, "num_hidden_layers": 3, "tie_word_embeddings": True, "rms_norm_eps": 1e-2},
            {"hidden_act": "gelu", "head_dim": 6, "num_key_value_heads": 1, "block_size": 5, "sliding_window": 4},
            {
                "linear_attn_alpha_factor": 1.5, "linear_attn_beta_factor": 0.7, "full_attn_alpha_factor": 2,
                "full_attn_beta_factor": 0.3, "mlp_alpha_factor": 0.9, "mlp_beta_factor": 1.3, "num_local_experts": 3,
            },
            {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "num_experts_per_tok": 1, "hidden_act": "relu"},
            {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2, **LLAMA3},
        )
    ],
    "zaya": [
        (ZAYA, change)
        for change in (
            {"attention_bias": True, "cca_time0": 3, "cca_time1": 1, "tie_word_embeddings": False},
            {
                "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"], "sliding_window": 4, "cca_time1": 3,
                "num_key_value_heads": 1, "hidden_act": "gelu", "rms_norm_eps": 1e-2,
            },
            {
                "num_hidden_layers": 1, "num_experts": 5, "cca_time0": 1,
                "rope_parameters": {"hybrid": {"rope_type": "default", "rope_theta": 50.0}},
            },
        )
    ],
    "inkling_text": [
        (INKLING, change)
        for change in (
            {"log_scaling_n_floor": 6, "log_scaling_alpha": 0.5, "conv_kernel_size": 3, "route_scale": 2.5},
            {"layer_types": None, "mlp_layer_types": None, "n_shared_experts": 1, "hidden_act": "gelu"},
            {"layer_types": ["hybrid"] * 3, "mlp_layer_types": ["dense"] * 3, "rel_extent": 40, "d_rel": 1},
            {"layer_types": ["hybrid_sliding"] * 2, "mlp_layer_types": ["sparse"] * 2, "num_hidden_layers": 2,
             "sliding_window_size": 1, "n_shared_experts": 3, "num_experts_per_tok": 5, "rms_norm_eps": 1e-2},
            {"log_scaling_n_floor": 1, "rel_extent": 1, "conv_kernel_size": 1, "num_key_value_heads": 4},
        )
    ],
    "qwen4_exp_text": [
        (QWEN4, change)
        for change in (
            {"ple_layer_ids": [1, 3], "ngram_size": 4, "ple_embed_dim": 12, "output_gate_type": "sigmoid",
             "ple_conv_kernel_size": 2, "hc_count": 3, "indexer_compress_ratio": 3, "eos_token_id": 20},
            {"ngram_size": 2, "heads_per_ngram": 1, "indexer_head_dim": 5, "indexer_budget": 4, "rms_norm_eps": 1e-2,
             "norm_topk_prob": False, "tie_word_embeddings": True, "seed": 7, "split_ngram_parts": 4},
            {"attention_bias": True, "hidden_act": "gelu", "output_gate_type": "silu", "layer_types": None,
             "full_attention_interval": 2, "num_hidden_layers": 5, "ple_layer_ids": [5], "num_key_value_heads": 1},
            {"layer_types": ["indexed_attention", "linear_attention"] * 2, "indexer_compress_ratio": 1,
             "indexer_budget": 3, "linear_conv_kernel_dim": 3, "make_ngram_vocab_size_divisible_by": 16,
             **rope("yarn", **YARN, partial_rotary_factor=0.5)},
            {"ple_layer_ids": None, "hc_lowrank": 40, "num_experts_per_tok": 5, "indexer_budget": 40,
             **rope("linear", factor=4.0, partial_rotary_factor=0.25)},
            {"layer_types": ["linear_attention"] * 4, "ple_layer_ids": [1, 2, 3, 4], "linear_num_value_heads": 6,
             **{name: None for name in ("indexer_n_heads", "indexer_kv_heads", "indexer_head_dim", "indexer_budget",
                                        "indexer_compress_ratio")}},
        )
    ],
    "hunyuan_v1_dense": [
        (LLAMA, change)
        for change in (
            {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 12, "rms_norm_eps": 1e-2},
            {"head_dim": 8, "hidden_act": "gelu", **rope("dynamic", alpha=50.0, factor=1.0)},
            {"head_dim": 8, "num_key_value_heads": None, **rope("yarn", **YARN)},
            {"head_dim": 8, **rope("proportional", partial_rotary_factor=0.5, factor=2.0)},
        )
    ],
}  # fmt: skip
"""Of each family (base config, what is changed in it)."""
