# SPDX-License-Identifier: Apache-2.0
"""Zamba: Mamba-1 layers of several heads, and before some of them one transformer that they share."""

from hybridlm.hf.families import common, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention, Mamba1, Shared
from hybridlm.model.config import ModelConfig

TYPES = {"linear_attention": "M", "hybrid": "A"}


def read(keys: Keys) -> ModelConfig:
    keys.carry("use_associative_scan", "use_mamba_kernels")
    D, n_layers, n_heads = keys("hidden_size", 3712), keys("num_hidden_layers", 76), keys("num_attention_heads", 16)
    wide = keys("attention_hidden_size", None) or 2 * D
    keys.require(wide == 2 * D, f"attention_hidden_size ({wide}) must be twice hidden_size ({D})")
    keys.only("attention_dropout", 0.0, 0)
    rank = keys("mamba_dt_rank", "auto")
    mamba = Mamba1(
        d_state=keys("mamba_d_state", 16), expand=keys("mamba_expand", 2), n_heads=keys("n_mamba_heads", 2),
        dt_rank=None if rank == "auto" else rank, d_conv=keys("mamba_d_conv", 4),
        conv_bias=keys("mamba_conv_bias", True), proj_bias=keys("mamba_proj_bias", False),
        activation=keys.choose("hidden_mamba_act", common.PLAIN, "silu"), **common.dt_init(keys),
    )  # fmt: skip
    d_head = keys("attention_head_dim", None) or keys("head_dim", None) or 2 * D // n_heads
    attention = Attention(n_heads, keys("num_key_value_heads", 16), d_head, rope=None, scale=(d_head / 2) ** -0.5)
    mlp = MLP(keys("intermediate_size", 14848), keys.choose("hidden_act", common.GATED, "gelu"))
    period, offset = keys("attn_layer_period", 6), keys("attn_layer_offset", 4)
    types = common.layer_types(keys, "layers_block_type", "layer_types", n_layers=n_layers)
    if types is None:
        types = ["hybrid" if i % period == offset else "linear_attention" for i in range(n_layers - 3)]
        types = ["linear_attention", "linear_attention", "hybrid", *types]
    pattern = common.as_pattern(keys, types, TYPES)
    blocks = {"M": mamba, "A": Shared(mamba, attention, mlp)}
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-5, 32000, True),
        pattern=pattern, blocks={symbol: blocks[symbol] for symbol in dict.fromkeys(pattern)},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    shared = common.block(config, Shared)
    mamba, attention, mlp = common.expect(shared.mixer, Mamba1), shared.attention, shared.mlp
    return {
        **common.write_widths(config, "rms_norm_eps"),
        "mamba_d_state": mamba.d_state, "mamba_expand": common.whole(mamba.expand), "n_mamba_heads": mamba.n_heads,
        "mamba_dt_rank": mamba.rank(config.d_model), "mamba_d_conv": mamba.d_conv, "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.proj_bias, "hidden_mamba_act": common.name_of(common.PLAIN, mamba.activation),
        "time_step_min": mamba.dt_min, "time_step_max": mamba.dt_max, "time_step_floor": mamba.dt_init_floor,
        "attention_hidden_size": 2 * config.d_model, "attention_head_dim": attention.d_head,
        "num_attention_heads": attention.n_heads, "num_key_value_heads": attention.kv_heads,
        "hidden_act": common.name_of(common.GATED, mlp.activation), "intermediate_size": mlp.d_ff,
        "layers_block_type": common.kinds(config), "num_hidden_layers": len(config.pattern),
    }  # fmt: skip


MAMBA = {
    "in_proj.weight": "mixer.in_xz: (H P c) D -> D c H P",
    "in_proj.bias": "mixer.in_xz_bias: (H P c) -> c H P",
    "conv1d.weight": "mixer.conv: (H P) 1 W -> H P W",
    "conv1d.bias": "mixer.conv_bias: (H P) -> H P",
    "x_proj_weight": "mixer.x_proj: H R P -> P H R",
    "dt_proj_weight": "mixer.dt_proj: H P R -> R H P",
    "dt_proj_bias": "mixer.dt_bias: H P",
    "A_log": "mixer.A_log: H P N",
    "D": "mixer.D: H P",
    "out_proj.weight": "mixer.out: D (H P) -> H P D",
    "out_proj.bias": "mixer.out_bias: D",
}
FAMILY = Family(
    model_type="zamba",
    architecture="ZambaForCausalLM",
    read=read,
    write=write,
    top=tables.top("model.embed_tokens", "model.final_layernorm"),
    layers={
        "M": {"input_layernorm.weight": "norm.weight: D", **tables.at("mamba.", MAMBA)},
        "A": {
            "mamba_decoder.input_layernorm.weight": "norm.weight: D",
            **tables.at("mamba_decoder.mamba.", MAMBA),
            "linear.weight": "link.linear: E D -> D E",
            "first:shared_transf.input_layernorm.weight": "shared.norm.weight: D",
            "first:shared_transf.pre_ff_layernorm.weight": "shared.mlp_norm.weight: D",
            **tables.at("first:shared_transf.self_attn.", tables.ATTENTION, "shared.attention"),
            **tables.at("first:shared_transf.feed_forward.", tables.GATED_MLP, "shared.mlp"),
        },
    },
)
