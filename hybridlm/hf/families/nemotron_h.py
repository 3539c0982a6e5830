# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H: one mixer a layer, of Mamba-2, attention without positions, an MLP without a gate, or a mixture of them.

NVIDIA's Mamba-2-Hybrid 8B (Waleffe et al. 2024) is the same layout with mlp_hidden_act "gelu". Step sizes are clamped
to time_step_limit, as NVIDIA's own code does.
"""

from hybridlm.hf.families import common, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention, GatedNorm, Mamba2, MoE, Router
from hybridlm.model.config import ModelConfig

SYMBOLS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
OLDER = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min", "mamba_dt_max": "time_step_max", "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor", "mamba_conv_bias": "use_conv_bias", "mamba_chunk_size": "chunk_size",
}  # fmt: skip
"""Keys of older files -> what they are now."""
EXPERT_KEYS = (
    "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "moe_latent_size",
    "moe_shared_expert_intermediate_size", "n_routed_experts", "moe_intermediate_size",
)  # fmt: skip
"""Keys that say nothing where there are no experts."""


def read(keys: Keys) -> ModelConfig:
    for older, name in OLDER.items():
        if older in keys.values:
            keys.values[name] = keys.values.pop(older)
    keys.carry("residual_in_fp32", "rescale_prenorm_residual", "use_mamba_kernels", "mamba_ssm_cache_dtype", "expand")
    keys.carry("mamba_proj_bias", "moe_shared_expert_overlap", "mtp_layers_block_type", "mtp_hybrid_override_pattern")
    keys.carry("time_step_rank", "rms_norm_eps", "norm_eps", "rope_theta", "partial_rotary_factor")  # not looked at
    keys.carry("n_shared_experts", "output_router_logits")  # there is one, of moe_shared_expert_intermediate_size
    for name in ("hidden_dropout", "num_nextn_predict_layers", "attention_bias", "sliding_window"):
        keys.only(name, None, 0)
    pattern = read_pattern(keys)
    mamba = Mamba2(
        d_state=keys("ssm_state_size", 128), d_head=keys("mamba_head_dim", 64), n_heads=keys("mamba_num_heads", 128),
        n_groups=keys("n_groups", 8), d_conv=keys("conv_kernel", 4), conv_bias=keys("use_conv_bias", True),
        activation=keys.choose("mamba_hidden_act", common.PLAIN, "silu"), proj_bias=keys("use_bias", False),
        gated_norm=GatedNorm(eps=keys("layer_norm_epsilon", 1e-5)),
        dt_limit=common.dt_limit(keys), chunk=keys("chunk_size", 128), **common.dt_init(keys),
    )  # fmt: skip
    activation = keys.choose("mlp_hidden_act", common.PLAIN, "relu2")
    bias = keys("mlp_bias", False)
    blocks = {
        "M": mamba,
        "E": read_experts(keys, activation, bias) if "E" in pattern else keys.carry(*EXPERT_KEYS),
        "*": Attention(**common.heads(keys, n_kv_heads=8, d_head=keys.some("attention_head_dim", 128)), rope=None),
        "-": MLP(keys("intermediate_size", 21504), activation, bias),
    }
    return ModelConfig(
        **common.widths(keys, "layer_norm_epsilon", 1e-5, 131072, False),
        pattern=pattern, blocks={symbol: block for symbol, block in blocks.items() if symbol in pattern},
    )  # fmt: skip


def read_experts(keys: Keys, activation: str, bias: bool) -> MoE:
    """The mixture; its routed experts have no biases."""
    router = Router(
        keys("num_experts_per_tok", 2), "sigmoid", renormalise=keys("norm_topk_prob", True),
        scaling=float(keys("routed_scaling_factor", 1.0)), selection_bias=True, n_groups=keys("n_group", 1),
        top_groups=keys("topk_group", 1),
    )  # fmt: skip
    shared = MLP(keys("moe_shared_expert_intermediate_size", 7688), activation, bias)
    latent = keys("moe_latent_size", None)
    return MoE(
        keys("n_routed_experts", 8), keys("moe_intermediate_size", 7688), activation, router, shared, d_latent=latent,
        latent_bias=bias and latent is not None, balance_weight=1e-4, z_weight=0.0,
    )  # fmt: skip


def read_pattern(keys: Keys) -> str:
    """The pattern, from the list of layer types or, in older files, itself."""
    keys.derived("num_hidden_layers")
    older = keys("hybrid_override_pattern", None)
    types = keys("layers_block_type", None) or keys("layer_types", None)
    if types is None:
        names = {symbol: name for name, symbol in SYMBOLS.items()}
        types = [names.get(s, s) for s in older] if older else ["linear_attention", "moe", "full_attention", "mlp"]
    return common.as_pattern(keys, [common.LEGACY_TYPES.get(kind, kind) for kind in types], SYMBOLS)


def write(config: ModelConfig) -> dict:
    mamba = common.block(config, Mamba2, Mamba2(n_heads=128))
    attention, moe = common.block(config, Attention, Attention(rope=None)), common.block(config, MoE, MoE())
    shared = common.expect(moe.shared or MLP(1, "relu2"), MLP)
    mlp = common.block(config, MLP, MLP(1, shared.activation, shared.bias))
    router = moe.router
    return {
        **common.write_widths(config, "layer_norm_epsilon"),
        **common.write_heads(attention),
        **common.write_dt(mamba),
        "mamba_num_heads": mamba.heads(config.d_model), "mamba_head_dim": mamba.d_head, "n_groups": mamba.n_groups,
        "ssm_state_size": mamba.d_state, "conv_kernel": mamba.d_conv, "use_conv_bias": mamba.conv_bias,
        "use_bias": mamba.proj_bias, "chunk_size": mamba.chunk or 128,
        "mamba_hidden_act": common.name_of(common.PLAIN, mamba.activation),
        "mlp_hidden_act": common.name_of(common.PLAIN, mlp.activation), "mlp_bias": mlp.bias,
        "intermediate_size": mlp.d_ff, "layers_block_type": common.kinds(config),
        "n_routed_experts": moe.n_experts, "moe_intermediate_size": moe.d_ff, "moe_latent_size": moe.d_latent,
        "moe_shared_expert_intermediate_size": shared.d_ff, "n_shared_experts": 1,
        "num_experts_per_tok": router.top_k, "norm_topk_prob": router.renormalise, "n_group": router.n_groups,
        "routed_scaling_factor": router.scaling, "topk_group": router.top_groups,
    }  # fmt: skip


NORM = {"norm.weight": "norm.weight: D"}
FAMILY = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    read=read,
    write=write,
    top=tables.top("backbone.embeddings", "backbone.norm_f"),
    layer="backbone.layers.{layer}.",
    layers={
        "M": {**NORM, **tables.at("mixer.", tables.MAMBA2)},
        "*": {**NORM, **tables.at("mixer.", tables.ATTENTION)},
        "-": {**NORM, **tables.at("mixer.", tables.PLAIN_MLP)},
        "E": {
            **NORM,
            "mixer.gate.weight": "mixer.router: E D -> D E",
            "mixer.gate.e_score_correction_bias": "mixer.selection_bias: E",
            "mixer.fc1_latent_proj.weight": "mixer.latent_in: R D -> D R",
            "mixer.fc1_latent_proj.bias": "mixer.latent_in_bias: R",
            "mixer.fc2_latent_proj.weight": "mixer.latent_out: D R -> R D",
            "mixer.fc2_latent_proj.bias": "mixer.latent_out_bias: D",
            "mixer.experts.{e}.up_proj.weight": "mixer.w_in: F D -> e D F",
            "mixer.experts.{e}.down_proj.weight": "mixer.w_out: D F -> e F D",
            **tables.at("mixer.shared_experts.", tables.PLAIN_MLP, "mixer.shared"),
        },
    },
    aliases=(("model.", "backbone."),),
    ties=False,
)
