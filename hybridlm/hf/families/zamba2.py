# SPDX-License-Identifier: Apache-2.0
"""Zamba2: Mamba-2 layers; before some of them a transformer, one of a few that take turns (Glorioso et al. 2024)."""

from hybridlm.hf.families import common, rope, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention, GatedNorm, Mamba2, Rope, Shared
from hybridlm.model.config import ModelConfig

BLOCKS = "ABCDEFGH"
"""Symbols of the transformers that take turns."""


def read(keys: Keys) -> ModelConfig:
    keys.only("use_long_context", False)
    keys.only("use_shared_mlp_adapter", True)
    keys.carry("use_conv_bias", "use_mem_eff_path", "use_mamba_kernels", "max_position_embeddings")
    keys.derived("kv_channels", "num_query_groups", "attention_hidden_size", "attention_head_dim", "mamba_headdim")
    keys.derived("hybrid_layer_ids", "head_dim")
    D, bias, rank = keys("hidden_size", 2560), keys("add_bias_linear", False), keys("adapter_rank", 128)
    n_heads, adapters = keys("num_attention_heads", 32), keys("use_shared_attention_adapter", False)
    keys.only("attention_dropout", 0.0, 0)
    d_inner, mamba_heads = int(keys("mamba_expand", 2) * D), keys("n_mamba_heads", 8)
    mamba = Mamba2(
        d_state=keys("mamba_d_state", 64), d_head=d_inner // mamba_heads, n_heads=mamba_heads,
        n_groups=keys("mamba_ngroups", 1), d_conv=keys("mamba_d_conv", 4), proj_bias=bias,
        gated_norm=GatedNorm(eps=1e-5), dt_limit=(keys("time_step_min", 0.001), float("inf")),
        chunk=keys("chunk_size", 256), **common.dt_init(keys),
    )  # fmt: skip
    d_head, rotary = 2 * D // n_heads, rope.read(keys, 4096)
    attention = Attention(
        n_heads, keys("num_key_value_heads", None) or n_heads, d_head, scale=(d_head / 2) ** -0.5,
        rope=rotary if keys("use_mem_rope", False) else None,
    )  # fmt: skip
    activation = keys.choose("hidden_act", common.GATED, "gelu")
    mlp = MLP(keys("intermediate_size", None) or 4 * D, activation, bias)
    shared = Shared(mamba, attention, mlp, mlp_adapter=rank, attention_adapter=rank if adapters else None)
    keys.require(not adapters or attention.kv_heads == n_heads, "use_shared_attention_adapter needs as many k/v heads")
    types = common.layer_types(keys, "layers_block_type", "layer_types", n_layers=keys("num_hidden_layers", 54))
    types = [{"l": "linear_attention", "h": "hybrid"}[c] for c in DEFAULT] if types is None else types
    n_blocks = keys("num_mem_blocks", 1)
    keys.require(1 <= n_blocks <= len(BLOCKS), f"num_mem_blocks ({n_blocks}) must be in 1..{len(BLOCKS)}")
    pattern, uses = common.as_pattern(keys, types, {"linear_attention": "M", "hybrid": "A"}), 0
    for i, symbol in enumerate(pattern):
        if symbol == "A":
            pattern = pattern[:i] + BLOCKS[uses % n_blocks] + pattern[i + 1 :]
            uses += 1
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-5, 32000, True),
        pattern=pattern, blocks={symbol: mamba if symbol == "M" else shared for symbol in dict.fromkeys(pattern)},
    )  # fmt: skip


DEFAULT = "l" + "lllllh" * 7 + "llllhlllhll"
"""The class's layer types where none are given."""


def write(config: ModelConfig) -> dict:
    shared = common.block(config, Shared)
    mamba, attention, mlp = common.expect(shared.mixer, Mamba2), shared.attention, shared.mlp
    symbols = {symbol for symbol in config.pattern if isinstance(config.blocks[symbol], Shared)}
    return {
        **common.write_widths(config, "rms_norm_eps"),
        "time_step_min": mamba.dt_limit[0], "time_step_max": mamba.dt_max, "time_step_floor": mamba.dt_init_floor,
        "mamba_d_state": mamba.d_state,
        "n_mamba_heads": mamba.heads(config.d_model),
        "mamba_expand": common.whole(mamba.heads(config.d_model) * mamba.d_head / config.d_model),
        "mamba_ngroups": mamba.n_groups, "mamba_d_conv": mamba.d_conv, "chunk_size": mamba.chunk or 256,
        "add_bias_linear": mlp.bias, "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.kv_heads, "use_mem_rope": attention.rope is not None,
        "rope_parameters": rope.write(attention.rope or Rope()), "intermediate_size": mlp.d_ff,
        "hidden_act": common.name_of(common.GATED, mlp.activation), "num_mem_blocks": len(symbols),
        "adapter_rank": shared.mlp_adapter, "use_shared_attention_adapter": shared.attention_adapter is not None,
        "layers_block_type": common.kinds(config), "num_hidden_layers": len(config.pattern),
    }  # fmt: skip


SHARED = "first:shared_transformer."
HYBRID = {
    "mamba_decoder.input_layernorm.weight": "norm.weight: D",
    **tables.at("mamba_decoder.mamba.", tables.MAMBA2),
    "linear.weight": "link.linear: E D -> D E",
    f"{SHARED}input_layernorm.weight": "shared.norm.weight: D",
    f"{SHARED}pre_ff_layernorm.weight": "shared.mlp_norm.weight: D",
    **tables.at(f"{SHARED}self_attn.", tables.ATTENTION, "shared.attention"),
    f"{SHARED}feed_forward.gate_up_proj.weight": "shared.mlp.w_in: (c F) D -> D c F",
    f"{SHARED}feed_forward.gate_up_proj.bias": "shared.mlp.b_in: (c F) -> c F",
    f"{SHARED}feed_forward.down_proj.weight": "shared.mlp.w_out: D F -> F D",
    f"{SHARED}feed_forward.down_proj.bias": "shared.mlp.b_out: D",
    f"{SHARED}feed_forward.gate_up_proj_adapter_list.{{use}}.0.weight": "link.adapters.mlp.a: R D -> D R",
    f"{SHARED}feed_forward.gate_up_proj_adapter_list.{{use}}.1.weight": "link.adapters.mlp.b: (c F) R -> R c F",
    **{
        f"{SHARED}self_attn.linear_{x}_adapter_list.{{use}}.0.weight": f"link.adapters.{x}.a: R D -> D R" for x in "qkv"
    },
    **{
        f"{SHARED}self_attn.linear_{x}_adapter_list.{{use}}.1.weight": f"link.adapters.{x}.b: (H P) R -> R H P"
        for x in "qkv"
    },
}
FAMILY = Family(
    model_type="zamba2",
    architecture="Zamba2ForCausalLM",
    read=read,
    write=write,
    top=tables.top("model.embed_tokens", "model.final_layernorm"),
    layers={
        "M": {"input_layernorm.weight": "norm.weight: D", **tables.at("mamba.", tables.MAMBA2)},
        **dict.fromkeys(BLOCKS, HYBRID),
    },
)
