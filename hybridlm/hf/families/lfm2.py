# SPDX-License-Identifier: Apache-2.0
"""LFM2: gated short convolutions and attention with normed heads, each before a gated MLP (Liquid AI 2025)."""

from typing import Any

from hybridlm.hf.families import common, rope, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention, GatedConv
from hybridlm.model.config import ModelConfig

OLDER = {"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"}
"""Keys of older files -> what they are now; where both stand, the older one counts."""
UNREAD = (
    "block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_swiglu",
    "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "use_pos_enc",
)  # fmt: skip
"""Keys of older files that the published implementation does not look at."""


def read(keys: Keys) -> ModelConfig:
    for older, name in OLDER.items():
        if older in keys.values:
            keys.values[name] = keys.values.pop(older)
    keys.carry(*UNREAD)
    mlp = MLP(d_ff(keys, keys("intermediate_size", 12288)))
    n_layers = keys("num_hidden_layers", 32)
    attends = keys("full_attn_idxs", None)
    types = common.layer_types(keys, "layer_types", n_layers=n_layers)
    if types is None:
        attends = range(n_layers) if attends is None else attends
        types = ["full_attention" if i in attends else "conv" for i in range(n_layers)]
    blocks = {"C": read_conv(keys, 3), "*": read_attention(keys), "-": mlp}
    pattern = common.as_pattern(keys, types, {"conv": "C-", "full_attention": "*-"})
    return ModelConfig(
        **common.widths(keys, "norm_eps", 1e-5, 65536, True, d_model=2560),
        pattern=pattern, blocks={symbol: block for symbol, block in blocks.items() if symbol in pattern},
    )  # fmt: skip


def read_conv(keys: Keys, d_conv: int) -> GatedConv:
    """The convolution; d_conv: its window by default."""
    return GatedConv(keys("conv_L_cache", d_conv), bias=keys("conv_bias", False))


def read_attention(keys: Keys) -> Attention:
    """Attention; its norms have the epsilon of the others."""
    return Attention(
        **common.heads(keys, n_kv_heads=8), rope=rope.read(keys, 128_000, theta=1e6), qk_norm=True,
        qk_norm_eps=keys("norm_eps", 1e-5),
    )  # fmt: skip


def d_ff(keys: Keys, width: int) -> int:
    """Feed-forward width: two thirds of what is given, times a multiplier, up to the next multiple of a size."""
    multiple, multiplier = keys("block_multiple_of", 256), keys("block_ffn_dim_multiplier", 1.0)
    if not keys("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    return width if multiplier is None else multiple * -(int(multiplier * width) // -multiple)


def write(config: ModelConfig) -> dict:
    return {
        **write_mixers(config),
        "intermediate_size": common.block(config, MLP).d_ff,
        "block_auto_adjust_ff_dim": False,
    }


def write_mixers(config: ModelConfig) -> dict[str, Any]:
    """What LFM2 with and without experts have in common."""
    conv, attention = common.block(config, GatedConv, GatedConv()), common.block(config, Attention, DEFAULT)
    types = common.kinds(config)[::2]
    return {
        **common.write_widths(config, "norm_eps"),
        **common.write_heads(attention),
        "rope_parameters": rope.write(rope.required(attention)),
        "conv_L_cache": conv.d_conv, "conv_bias": conv.bias, "num_hidden_layers": len(types), "layer_types": types,
    }  # fmt: skip


DEFAULT = Attention(qk_norm=True)
"""What is written where there is no attention."""
NORM = {"operator_norm.weight": "norm.weight: D"}
MLP_NORM = {"ffn_norm.weight": "norm.weight: D"}
GATED_MLP = tables.named(tables.GATED_MLP, gate_proj="w1", up_proj="w3", down_proj="w2")
HEADS = tables.named(tables.ATTENTION, q_norm="q_layernorm", k_norm="k_layernorm", o_proj="out_proj")
LAYERS = {
    "C": {**NORM, **tables.at("conv.", tables.GATED_CONV)},
    "*": {**NORM, **tables.at("self_attn.", HEADS)},
    "-": {**MLP_NORM, **tables.at("feed_forward.", GATED_MLP)},
}
FAMILY = Family(
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=tables.top("model.embed_tokens", "model.embedding_norm"),
    layers=LAYERS,
)
