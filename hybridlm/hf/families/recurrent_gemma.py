# SPDX-License-Identifier: Apache-2.0
"""RecurrentGemma: Griffin's recurrent blocks and windowed attention in turns, each before a gated MLP.

A token sees itself and attention_window_size tokens before it, as in Google's own code; transformers has one fewer.
"""

from dataclasses import replace

import ml_dtypes
import numpy as np

from hybridlm.hf.families import common, rope, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, RGLRU, Attention, Rope
from hybridlm.model.config import ModelConfig

SYMBOLS = {"recurrent": "R-", "attention": "w-"}


def read(keys: Keys) -> ModelConfig:
    keys.carry("final_w_init_variance_scale", "w_init_variance_scale", "layers_block_type")
    keys.only("embeddings_scale_by_sqrt_dim", True)
    keys.values.pop("head_dim", None)  # the class has the model width over the heads, whatever stands here
    types = keys("_block_types", None) or ("recurrent", "recurrent", "attention")
    types = keys("block_types", None) or types
    n_layers = keys("num_hidden_layers", 26)
    types = (list(types) * n_layers)[:n_layers]
    keys.require(set(types) <= set(SYMBOLS), f"block_types ({types}) must be of {', '.join(SYMBOLS)}")
    pattern = "".join(SYMBOLS[kind] for kind in types)
    D, bias = keys("hidden_size", 2560), keys("attention_bias", False)
    activation = keys.only("hidden_activation", *common.GATED, default="gelu_pytorch_tanh")
    attention = Attention(
        **common.heads(keys, n_heads=10), window=keys("attention_window_size", 2048) + 1, qkv_bias=bias, out_bias=True,
        rope=rope.read(keys, 2048, fraction=0.5),
    )  # fmt: skip
    keys.require(attention.rope.scaling is None, "rope_type: only 'default' is supported")
    recurrent = RGLRU(
        attention.n_heads, keys("lru_width", None) or D, keys("conv1d_width", 4), common.PLAIN[activation]
    )
    mlp = MLP(keys("intermediate_size", 7680) // 2, common.GATED[activation], bias=True)
    blocks = {"R": recurrent, "w": attention, "-": mlp}
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-6, 256_000, True, d_model=2560),
        norm_offset=1.0, embedding_multiplier=embedding_multiplier(D),
        logit_softcap=float(keys("logits_soft_cap", 30.0)), pattern=pattern,
        blocks={symbol: block for symbol, block in blocks.items() if symbol in pattern},
    )  # fmt: skip


def embedding_multiplier(d_model: int) -> float:
    """sqrt(D), rounded to bfloat16 as published."""
    return float(np.sqrt(d_model).astype(ml_dtypes.bfloat16))


def write(config: ModelConfig) -> dict:
    recurrent = common.block(config, RGLRU, RGLRU(1))
    attention = common.block(config, Attention, DEFAULT)
    if not any(isinstance(config.blocks[symbol], Attention) for symbol in config.pattern):
        attention = replace(attention, n_heads=recurrent.n_heads, d_head=config.d_model // recurrent.n_heads)
    mlp = common.block(config, MLP)
    types = ["recurrent" if isinstance(config.blocks[s], RGLRU) else "attention" for s in config.pattern[::2]]
    period = next(n for n in range(1, len(types) + 1) if (types[:n] * len(types))[: len(types)] == types)
    heads = common.write_heads(attention)
    return {
        **common.write_widths(config, "rms_norm_eps"),
        **{name: heads[name] for name in ("num_attention_heads", "num_key_value_heads")},
        "attention_bias": attention.qkv_bias, "attention_window_size": (attention.window or 1) - 1,
        "rope_parameters": rope.write(rope.required(attention), always=True),
        "lru_width": recurrent.d_inner or config.d_model, "conv1d_width": recurrent.d_conv,
        "hidden_activation": common.name_of(common.GATED, mlp.activation), "intermediate_size": 2 * mlp.d_ff,
        "logits_soft_cap": config.logit_softcap or 30.0, "num_hidden_layers": len(types), "block_types": types[:period],
    }  # fmt: skip


DEFAULT = Attention(window=2049, out_bias=True, rope=Rope(fraction=0.5))
"""What is written where there is no attention."""
NORM = {"temporal_pre_norm.weight": "norm.weight: D"}
RECURRENT = {
    "linear_y.weight": "mixer.w_in: (H P) D -> D 0 H P",
    "linear_x.weight": "mixer.w_in: (H P) D -> D 1 H P",
    "linear_y.bias": "mixer.b_in: (H P) -> 0 H P",
    "linear_x.bias": "mixer.b_in: (H P) -> 1 H P",
    "conv_1d.weight": "mixer.conv: (H P) 1 W -> H P W",
    "conv_1d.bias": "mixer.conv_bias: (H P) -> H P",
    "rg_lru.input_gate_weight": "mixer.w_gates: H Q P -> Q 0 H P",
    "rg_lru.recurrent_gate_weight": "mixer.w_gates: H Q P -> Q 1 H P",
    "rg_lru.input_gate_bias": "mixer.b_gates: H P -> 0 H P",
    "rg_lru.recurrent_gate_bias": "mixer.b_gates: H P -> 1 H P",
    "rg_lru.recurrent_param": "mixer.decay: (H P) -> H P",
    "linear_out.weight": "mixer.w_out: D (H P) -> H P D",
    "linear_out.bias": "mixer.b_out: D",
}
"""Griffin's recurrent block."""
FAMILY = Family(
    model_type="recurrent_gemma",
    architecture="RecurrentGemmaForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=tables.top("model.embed_tokens", "model.final_norm"),
    layers={
        "R": {**NORM, **tables.at("temporal_block.", RECURRENT)},
        "w": {**NORM, **tables.at("temporal_block.", tables.ATTENTION)},
        "-": {"channel_pre_norm.weight": "norm.weight: D", **tables.at("mlp_block.", tables.GATED_MLP)},
    },
)
