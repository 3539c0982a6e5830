# SPDX-License-Identifier: Apache-2.0
"""Llama: attention with rotary positions, then a gated MLP, in every layer."""

from hybridlm.hf.families import common, rope, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention
from hybridlm.model.config import ModelConfig


def read(keys: Keys) -> ModelConfig:
    bias = keys("attention_bias", False)
    keys.carry("pretraining_tp")
    attention = Attention(**common.heads(keys), rope=rope.read(keys, 2048), qkv_bias=bias, out_bias=bias)
    activation = keys.choose("hidden_act", common.GATED, "silu")
    mlp = MLP(keys("intermediate_size", 11008), activation, keys("mlp_bias", False))
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-6, 32000, False),
        pattern="*-" * keys("num_hidden_layers", 32), blocks={"*": attention, "-": mlp},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    attention, mlp = common.block(config, Attention), common.block(config, MLP)
    return {
        **common.write_widths(config, "rms_norm_eps"),
        **common.write_heads(attention),
        "rope_parameters": rope.write(rope.required(attention)),
        "attention_bias": attention.qkv_bias,
        "mlp_bias": mlp.bias,
        "hidden_act": common.name_of(common.GATED, mlp.activation),
        "intermediate_size": mlp.d_ff,
        "num_hidden_layers": len(config.pattern) // 2,
    }


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=tables.top("model.embed_tokens", "model.norm"),
    layers={
        "*": {"input_layernorm.weight": "norm.weight: D", **tables.at("self_attn.", tables.ATTENTION)},
        "-": {"post_attention_layernorm.weight": "norm.weight: D", **tables.at("mlp.", tables.GATED_MLP)},
    },
)
