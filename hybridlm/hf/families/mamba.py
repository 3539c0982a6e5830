# SPDX-License-Identifier: Apache-2.0
"""Mamba: one Mamba-1 mixer a layer, no attention (Gu & Dao 2023)."""

import math

from hybridlm.hf.families import common, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import InnerNorm, Mamba1
from hybridlm.model.config import ModelConfig


def read(keys: Keys, inner_norm: InnerNorm | None = None) -> ModelConfig:
    """inner_norm: what the keys do not say."""
    keys.carry("residual_in_fp32", "rescale_prenorm_residual", "use_mambapy", "use_associative_scan", "layer_types")
    keys.carry("d_model", "d_inner", "n_layer", "fused_add_norm", "rms_norm", "ssm_cfg", "pad_vocab_size_multiple")
    D, rank = keys("hidden_size", 768), keys("time_step_rank", "auto")
    d_inner = keys("intermediate_size", None) or math.floor(keys("expand", 2) * D)
    keys.derived("expand")
    mamba = Mamba1(
        d_state=keys("state_size", 16), expand=d_inner / D, dt_rank=None if rank == "auto" else rank,
        d_conv=keys("conv_kernel", 4), conv_bias=keys("use_conv_bias", True), proj_bias=keys("use_bias", False),
        activation=keys.choose("hidden_act", common.PLAIN, "silu"), inner_norm=inner_norm,
        dt_scale=keys("time_step_scale", 1.0), dt_init=keys.only("time_step_init_scheme", "random", "constant"),
        **common.dt_init(keys),
    )  # fmt: skip
    fields = common.widths(keys, "layer_norm_epsilon", 1e-5, 50280, True, 768)
    return ModelConfig(
        **{**fields, "init_std": keys("initializer_range", 0.1)},
        pattern="M" * keys("num_hidden_layers", 32), blocks={"M": mamba},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    mamba = common.block(config, Mamba1)
    d_inner = mamba.inner(config.d_model)
    return {
        **common.write_widths(config, "layer_norm_epsilon"),
        "state_size": mamba.d_state, "expand": max(1, d_inner // config.d_model), "intermediate_size": d_inner,
        "time_step_rank": mamba.rank(config.d_model), "conv_kernel": mamba.d_conv, "use_conv_bias": mamba.conv_bias,
        "use_bias": mamba.proj_bias, "hidden_act": common.name_of(common.PLAIN, mamba.activation),
        "time_step_min": mamba.dt_min, "time_step_max": mamba.dt_max, "time_step_floor": mamba.dt_init_floor,
        "time_step_scale": mamba.dt_scale, "time_step_init_scheme": mamba.dt_init,
        "num_hidden_layers": len(config.pattern),
    }  # fmt: skip


FAMILY = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    read=read,
    write=write,
    top=tables.top("backbone.embeddings", "backbone.norm_f"),
    layer="backbone.layers.{layer}.",
    layers={"M": {"norm.weight": "norm.weight: D", **tables.at("mixer.", tables.MAMBA1)}},
    aliases=(("backbone.embedding.", "backbone.embeddings."), ("model.", "backbone.")),
)
