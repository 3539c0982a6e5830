# SPDX-License-Identifier: Apache-2.0
"""Qwen2: Llama with biases on queries, keys and values, and windows in some layers."""

from hybridlm.hf.families import common, rope, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention
from hybridlm.model.config import ModelConfig


def read(keys: Keys) -> ModelConfig:
    attention = Attention(
        **common.heads(keys, n_kv_heads=32), rope=rope.read(keys, 32768), qkv_bias=True, out_bias=False
    )
    return read_layers(keys, attention)


def read_layers(keys: Keys, attention: Attention) -> ModelConfig:
    """What Qwen2 and Qwen3 have in common: layers of attention, some of them windowed, and a gated MLP."""
    n_layers = keys("num_hidden_layers", 32)
    width = keys("sliding_window", 4096)
    window = width if keys("use_sliding_window", False) else None
    first = keys("max_window_layers", 28)
    types = common.layer_types(keys, "layer_types", n_layers=n_layers)
    if types is None:
        types = ["sliding_attention" if window and i >= first else "full_attention" for i in range(n_layers)]
    pattern = common.as_pattern(keys, types, {"full_attention": "*-", "sliding_attention": "w-"})
    keys.require("w" not in pattern or window, "layer_types ('sliding_attention') needs use_sliding_window")
    blocks = {
        "*": attention,
        "w": Attention(**{**vars(attention), "window": window}),
        "-": MLP(keys("intermediate_size", 22016), keys.choose("hidden_act", common.GATED, "silu")),
    }
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-6, 151936, False),
        pattern=pattern, blocks={symbol: block for symbol, block in blocks.items() if symbol in pattern},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    attention = common.block(config, Attention, window=None)
    mlp = common.block(config, MLP)
    windows = [b.window for s in config.pattern if isinstance(b := config.blocks[s], Attention)]
    return {
        **common.write_widths(config, "rms_norm_eps"),
        **common.write_heads(attention),
        "rope_parameters": rope.write(rope.required(attention)),
        "hidden_act": common.name_of(common.GATED, mlp.activation),
        "intermediate_size": mlp.d_ff,
        "num_hidden_layers": len(windows),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "use_sliding_window": any(windows),
        "sliding_window": next(filter(None, windows), None),
        "max_window_layers": len(windows),
    }


ATTENTION = {"input_layernorm.weight": "norm.weight: D", **tables.at("self_attn.", tables.ATTENTION)}
FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=tables.top("model.embed_tokens", "model.norm"),
    layers={
        "*": ATTENTION,
        "w": ATTENTION,
        "-": {"post_attention_layernorm.weight": "norm.weight: D", **tables.at("mlp.", tables.GATED_MLP)},
    },
)
