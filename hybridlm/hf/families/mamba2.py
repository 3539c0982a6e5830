# SPDX-License-Identifier: Apache-2.0
"""Mamba-2: one mixer a layer, no attention (Dao & Gu 2024)."""

from hybridlm.hf.families import common, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import GatedNorm, Mamba2
from hybridlm.model.config import ModelConfig


def read(keys: Keys) -> ModelConfig:
    D, H, P = keys("hidden_size", 4096), keys("num_heads", 128), keys("head_dim", 64)
    keys.require(keys("expand", 2) * D == H * P, f"hidden_size ({D}) * expand is not num_heads ({H}) * head_dim ({P})")
    keys.carry("residual_in_fp32", "rescale_prenorm_residual", "time_step_rank", "norm_before_gate", "rms_norm")
    keys.carry("time_step_init_scheme", "time_step_scale")
    keys.require(keys.some("intermediate_size", H * P) == H * P, "intermediate_size is not num_heads * head_dim")
    mamba = Mamba2(
        d_state=keys("state_size", 128), d_head=P, n_heads=H, n_groups=keys("n_groups", 8),
        d_conv=keys("conv_kernel", 4), conv_bias=keys("use_conv_bias", True),
        activation=keys.choose("hidden_act", common.PLAIN, "silu"), proj_bias=keys("use_bias", False),
        gated_norm=GatedNorm(eps=keys("layer_norm_epsilon", 1e-5)), dt_limit=common.dt_limit(keys),
        chunk=keys("chunk_size", 256), **common.dt_init(keys),
    )  # fmt: skip
    return ModelConfig(
        **{**common.widths(keys, "layer_norm_epsilon", 1e-5, 32768, False), "init_std": keys("initializer_range", 0.1)},
        pattern="M" * keys("num_hidden_layers", 64), blocks={"M": mamba},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    mamba = common.block(config, Mamba2)
    H = mamba.heads(config.d_model)
    return {
        **common.write_widths(config, "layer_norm_epsilon"),
        **common.write_dt(mamba),
        "num_heads": H, "head_dim": mamba.d_head, "state_size": mamba.d_state, "n_groups": mamba.n_groups,
        "expand": common.whole(H * mamba.d_head / config.d_model), "conv_kernel": mamba.d_conv,
        "use_conv_bias": mamba.conv_bias, "use_bias": mamba.proj_bias, "chunk_size": mamba.chunk or 256,
        "hidden_act": common.name_of(common.PLAIN, mamba.activation), "num_hidden_layers": len(config.pattern),
    }  # fmt: skip


FAMILY = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    read=read,
    write=write,
    top=tables.top("backbone.embeddings", "backbone.norm_f"),
    layer="backbone.layers.{layer}.",
    layers={"M": {"norm.weight": "norm.weight: D", **tables.at("mixer.", tables.MAMBA2)}},
    aliases=(("backbone.embedding.", "backbone.embeddings."), ("model.", "backbone.")),
)
