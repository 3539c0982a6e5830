# SPDX-License-Identifier: Apache-2.0
"""Granite 4: Mamba-2 or attention, then a gated MLP, with experts or alone; multipliers of embeddings and much else."""

from hybridlm.hf.families import common, rope, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention, Mamba2, MoE, Rope, Router
from hybridlm.model.config import ModelConfig


def read(keys: Keys) -> ModelConfig:
    act = keys.choose("hidden_act", common.GATED, "silu")
    keys.only("normalization_function", "rmsnorm")
    keys.carry("init_method")
    keys.carry("output_router_logits")
    mlp, n_experts = MLP(keys("shared_intermediate_size", 1024), act), keys.some("num_local_experts", 8)
    top_k, d_ff = keys.some("num_experts_per_tok", 2), keys("intermediate_size", 11008)
    weight = keys.some("router_aux_loss_coef", 0.001)
    moe = None
    if n_experts:
        router = Router(top_k, "softmax_after")
        moe = MoE(n_experts, d_ff, act, router, mlp, balance_weight=weight, z_weight=0.0)
    bias, n_layers = keys("attention_bias", False), keys("num_hidden_layers", 32)
    rotary = rope.read(keys, 2048)
    attention = Attention(
        **common.heads(keys), qkv_bias=bias, out_bias=bias, scale=float(keys("attention_multiplier", 1.0)),
        rope=keys.choose("position_embedding_type", {None: None, "nope": None, "rope": rotary}, None),
    )  # fmt: skip
    types = common.layer_types(keys, "layer_types", "layers_block_type", n_layers=n_layers)
    types = ["linear_attention"] * n_layers if types is None else types
    last = "E" if n_experts else "-"
    pattern = common.as_pattern(keys, types, {"linear_attention": "M" + last, "full_attention": "*" + last})
    blocks = {
        "M": common.mamba_prefixed(keys, 1e-6),
        "*": attention,
        "-": mlp,
        "E": moe,
    }
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-6, 32000, False),
        embedding_multiplier=float(keys("embedding_multiplier", 1.0)),
        residual_multiplier=float(keys("residual_multiplier", 1.0)),
        logit_multiplier=1 / keys("logits_scaling", 1.0),
        pattern=pattern, blocks={symbol: block for symbol, block in blocks.items() if symbol in pattern},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    attention = common.block(config, Attention, Attention(rope=None))
    moe = common.block(config, MoE, MoE(1, 1, router=Router(1)))
    mlp = common.block(config, MLP, moe.shared)
    mamba = common.block(config, Mamba2, Mamba2(d_head=2 * config.d_model, n_heads=1))
    types = common.kinds(config)[::2]
    return {
        **common.write_widths(config, "rms_norm_eps"),
        **common.write_heads(attention),
        **common.write_mamba_prefixed(mamba, config),
        "position_embedding_type": None if attention.rope is None else "rope",
        "rope_parameters": rope.write(attention.rope or Rope()),
        "attention_multiplier": attention.score_scale,
        "embedding_multiplier": config.embedding_multiplier, "residual_multiplier": config.residual_multiplier,
        "logits_scaling": common.inverse(config.logit_multiplier), "attention_bias": attention.qkv_bias,
        "hidden_act": common.name_of(common.GATED, mlp.activation), "shared_intermediate_size": mlp.d_ff,
        "num_local_experts": moe.n_experts if moe.shared else 0, "num_experts_per_tok": moe.router.top_k,
        "intermediate_size": moe.d_ff, "router_aux_loss_coef": moe.balance_weight,
        "num_hidden_layers": len(types), "layer_types": types,
    }  # fmt: skip


NORM = {"input_layernorm.weight": "norm.weight: D"}
MLP_NORM = {"post_attention_layernorm.weight": "norm.weight: D"}
FAMILY = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=tables.top("model.embed_tokens", "model.norm"),
    layers={
        "M": {**NORM, **tables.at("mamba.", tables.MAMBA2)},
        "*": {**NORM, **tables.at("self_attn.", tables.ATTENTION)},
        "-": {**MLP_NORM, **tables.at("shared_mlp.", tables.FUSED_MLP)},
        "E": {
            **MLP_NORM,
            "block_sparse_moe.router.layer.weight": "mixer.router: E D -> D E",
            "block_sparse_moe.input_linear.weight": "mixer.w_in: E (c F) D -> E D c F",
            "block_sparse_moe.output_linear.weight": "mixer.w_out: E D F -> E F D",
            **tables.at("shared_mlp.", tables.FUSED_MLP, "mixer.shared"),
        },
    },
)
