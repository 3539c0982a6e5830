# SPDX-License-Identifier: Apache-2.0
"""Bamba: Mamba-2 or, in some layers, attention that rotates half of each head, then a gated MLP."""

from hybridlm.hf.families import common, rope, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention, Mamba2, Rope
from hybridlm.model.config import ModelConfig


def read(keys: Keys) -> ModelConfig:
    keys.carry("z_loss_coefficient")
    keys.derived("layers_block_type", "layer_types")
    bias = keys("attention_bias", False)
    attention = Attention(
        **common.heads(keys, n_kv_heads=8), rope=rope.read(keys, 262144, fraction=0.5), qkv_bias=bias, out_bias=bias
    )
    rotated = keys.some("attn_rotary_emb", attention.d_head // 2)
    keys.require(rotated == attention.d_head // 2, f"attn_rotary_emb ({rotated}) is not half of a head")
    at = keys("attn_layer_indices", None) or []
    pattern = "".join("*-" if i in at else "M-" for i in range(keys("num_hidden_layers", 32)))
    blocks = {
        "M": common.mamba_prefixed(keys, 1e-5),
        "*": attention,
        "-": MLP(
            keys("intermediate_size", 14336), keys.choose("hidden_act", common.GATED, "silu"), keys("mlp_bias", False)
        ),
    }
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-5, 128000, False),
        pattern=pattern, blocks={symbol: block for symbol, block in blocks.items() if symbol in pattern},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    attention, mlp = (
        common.block(config, Attention, Attention(rope=Rope(fraction=0.5))),
        common.block(config, MLP),
    )
    mamba = common.block(config, Mamba2, Mamba2(d_head=2 * config.d_model, n_heads=1))
    return {
        **common.write_widths(config, "rms_norm_eps"),
        **common.write_heads(attention),
        **common.write_mamba_prefixed(mamba, config),
        "rope_parameters": rope.write(rope.required(attention), always=True),
        "attention_bias": attention.qkv_bias, "mlp_bias": mlp.bias,
        "hidden_act": common.name_of(common.GATED, mlp.activation),
        "intermediate_size": mlp.d_ff, "num_hidden_layers": len(config.pattern) // 2,
        "attn_layer_indices": [i for i, kind in enumerate(common.kinds(config)[::2]) if kind == "full_attention"],
    }  # fmt: skip


NORM = {"input_layernorm.weight": "norm.weight: D"}
FAMILY = Family(
    model_type="bamba",
    architecture="BambaForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=tables.top("model.embed_tokens", "model.final_layernorm"),
    layers={
        "M": {**NORM, **tables.at("mamba.", tables.MAMBA2)},
        "*": {**NORM, **tables.at("self_attn.", tables.ATTENTION)},
        "-": {"pre_ff_layernorm.weight": "norm.weight: D", **tables.at("feed_forward.", tables.GATED_MLP)},
    },
)
