# SPDX-License-Identifier: Apache-2.0
"""Falcon-H1: Mamba-2 and attention side by side, then a gated MLP; multipliers nearly everywhere (Zuo et al. 2025)."""

from dataclasses import replace

from hybridlm.errors import ConfigError
from hybridlm.hf.families import common, rope, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention, Branch, Mamba2, Parallel
from hybridlm.model.config import ModelConfig


def read(keys: Keys) -> ModelConfig:
    keys.derived("layers_block_type", "layer_types")
    keys.only("mamba_use_mlp", True)
    keys.carry("mlp_expansion_factor", "time_step_min", "time_step_max", "time_step_floor", "time_step_rank")
    bias, norm_first = keys("attention_bias", False), keys("mamba_norm_before_gate", True)
    attention = Attention(
        **common.heads(keys, n_kv_heads=8), rope=rope.read(keys, 8192), qkv_bias=bias, out_bias=bias,
        key_multiplier=keys("key_multiplier", 1.0),
    )  # fmt: skip
    mamba = common.mamba_prefixed(keys, 1e-5)
    norm = replace(mamba.gated_norm, before_gate=norm_first) if keys("mamba_rms_norm", False) else None
    mamba = replace(
        mamba, gated_norm=norm, multipliers=tuple(keys.some("ssm_multipliers", [1.0] * 5)),
        out_bias=keys("projectors_bias", False),
    )  # fmt: skip
    gate, out = keys.some("mlp_multipliers", [1.0, 1.0])
    branches = {
        "mamba": Branch(mamba, keys("ssm_in_multiplier", 1.0), keys("ssm_out_multiplier", 1.0)),
        "attention": Branch(attention, keys("attention_in_multiplier", 1.0), keys("attention_out_multiplier", 1.0)),
    }
    act = keys.choose("hidden_act", common.GATED, "silu")
    mlp = MLP(keys("intermediate_size", 14336), act, keys("mlp_bias", False), gate, out)
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-5, 128000, False),
        embedding_multiplier=keys("embedding_multiplier", 1.0), logit_multiplier=keys("lm_head_multiplier", 1.0),
        pattern="P-" * keys("num_hidden_layers", 32), blocks={"P": Parallel(branches), "-": mlp},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    branches, mlp = common.block(config, Parallel).branches, common.block(config, MLP)
    if {name: type(branch.mixer) for name, branch in branches.items()} != {"mamba": Mamba2, "attention": Attention}:
        raise ConfigError("blocks: Parallel without the branches mamba (Mamba2) and attention (Attention)")
    mamba, attention = branches["mamba"].mixer, branches["attention"].mixer
    norm = mamba.gated_norm
    return {
        **common.write_widths(config, "rms_norm_eps"),
        **common.write_heads(attention),
        **common.write_mamba_prefixed(mamba, config),
        "mamba_d_ssm": mamba.heads(config.d_model) * mamba.d_head, "mamba_expand": 2,
        "mamba_rms_norm": norm is not None, "mamba_norm_before_gate": norm is None or norm.before_gate,
        "projectors_bias": mamba.proj_bias if mamba.out_bias is None else mamba.out_bias,
        "ssm_multipliers": list(mamba.multipliers), "ssm_in_multiplier": branches["mamba"].in_multiplier,
        "ssm_out_multiplier": branches["mamba"].out_multiplier, "key_multiplier": attention.key_multiplier,
        "attention_in_multiplier": branches["attention"].in_multiplier,
        "attention_out_multiplier": branches["attention"].out_multiplier,
        "mlp_multipliers": [mlp.gate_multiplier, mlp.out_multiplier], "mlp_bias": mlp.bias,
        "rope_parameters": rope.write(rope.required(attention)), "attention_bias": attention.qkv_bias,
        "embedding_multiplier": config.embedding_multiplier, "lm_head_multiplier": config.logit_multiplier,
        "hidden_act": common.name_of(common.GATED, mlp.activation), "intermediate_size": mlp.d_ff,
        "num_hidden_layers": len(config.pattern) // 2,
    }  # fmt: skip


FAMILY = Family(
    model_type="falcon_h1",
    architecture="FalconH1ForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=tables.top("model.embed_tokens", "model.final_layernorm"),
    layers={
        "P": {
            "input_layernorm.weight": "norm.weight: D",
            **tables.at("mamba.", tables.MAMBA2, "mixer.branches.mamba"),
            **tables.at("self_attn.", tables.ATTENTION, "mixer.branches.attention"),
        },
        "-": {"pre_ff_layernorm.weight": "norm.weight: D", **tables.at("feed_forward.", tables.GATED_MLP)},
    },
    skipped=(r"rotary_emb\.inv_freq$", r"mup_vector$"),
)
