# SPDX-License-Identifier: Apache-2.0
"""ZAYA1: convolved attention, and experts chosen by a router whose state goes from layer to layer (Zyphra 2025)."""

from dataclasses import replace

from hybridlm.hf.families import common, rope, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import ConvolvedAttention, DepthMoE, Rope
from hybridlm.model.config import ModelConfig

ROPES = {"hybrid": Rope(5e6, 0.5), "hybrid_sliding": Rope(10_000.0, 0.5)}
"""The class's rotations."""
SYMBOLS = {"hybrid": "*", "hybrid_sliding": "w"}


def read(keys: Keys) -> ModelConfig:
    keys.carry("output_router_logits")
    keys.only("lm_head_bias", False)
    n_layers, width = keys("num_hidden_layers", 40), keys("sliding_window", None)
    types = common.layer_types(keys, "layer_types", n_layers=n_layers) or ["hybrid"] * n_layers
    mixers = common.as_pattern(keys, types, SYMBOLS)
    pattern = "".join(mixer + ("E" if i else "e") for i, mixer in enumerate(mixers))
    keys.require("w" not in pattern or width is not None, "layer_types ('hybrid_sliding') needs sliding_window")
    ropes = rope.read_each(keys, 131_072, ROPES, fraction=1.0)
    missing = [kind for kind in ROPES if kind in types and kind not in ropes]
    keys.require(not missing, f"rope_parameters has no {', '.join(missing)}")
    heads = common.heads(keys, n_heads=8, n_kv_heads=2, d_head=128)
    attention = ConvolvedAttention(
        **heads, d_conv=keys("cca_time0", 2), d_conv_heads=keys("cca_time1", 2), bias=keys("attention_bias", False)
    )
    moe = DepthMoE(
        keys("num_experts", 16), keys("moe_intermediate_size", 2048), keys.choose("hidden_act", common.GATED, "silu"),
        keys("router_hidden_size", 256), top_k=keys.only("num_experts_per_tok", 1), norm_eps=keys("rms_norm_eps", 1e-5),
    )  # fmt: skip
    blocks = {
        "*": replace(attention, rope=ropes.get("hybrid", ROPES["hybrid"])),
        "w": replace(attention, rope=ropes.get("hybrid_sliding", ROPES["hybrid_sliding"]), window=width),
        "e": replace(moe, first=True),
        "E": moe,
    }
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-5, 262_272, True, d_model=2048), channel_scales=True,
        pattern=pattern, blocks={symbol: block for symbol, block in blocks.items() if symbol in pattern},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    found = [common.expect(config.blocks[symbol], ConvolvedAttention) for symbol in config.pattern[::2]]
    moe = common.expect(config.blocks[config.pattern[1]], DepthMoE)
    attention = found[0]
    kinds = ["hybrid" if block.window is None else "hybrid_sliding" for block in found]
    ropes = {kind: block.rope for kind, block in zip(kinds, found, strict=True)}
    return {
        **common.write_widths(config, "rms_norm_eps"),
        "num_attention_heads": attention.n_heads, "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.d_head, "cca_time0": attention.d_conv, "cca_time1": attention.d_conv_heads,
        "attention_bias": attention.bias, "sliding_window": next((b.window for b in found if b.window), None),
        "rope_parameters": {kind: rope.write(of, always=True) for kind, of in (ROPES | ropes).items()},
        "num_experts": moe.n_experts, "moe_intermediate_size": moe.d_ff, "router_hidden_size": moe.d_router,
        "num_experts_per_tok": moe.top_k, "hidden_act": common.name_of(common.GATED, moe.activation),
        "num_hidden_layers": len(kinds), "layer_types": kinds,
    }  # fmt: skip


def scales(name: str) -> dict[str, str]:
    """Of a residual scaling."""
    return {
        f"{name}.{array}_{part}": f"scales.{part}: D -> {i} D"
        for part in ("scale", "bias")
        for i, array in enumerate(("residual", "hidden_states"))
    }


def convolution(part: str, bias: str, weight: str) -> dict[str, list[str]]:
    """A convolution over queries and keys together; weight: its axes, with H for their heads."""
    names = [(name, letter) for name, letter in (("q", "H"), ("k", "K"))]
    return {
        f"{part}.weight": [f"mixer.{bias}_{name}: " + weight.replace("H", letter) for name, letter in names],
        f"{part}.bias": [f"mixer.{bias}_{name}_bias: ({letter} P) -> {letter} P" for name, letter in names],
    }


ATTENTION = {
    **tables.norm("input_layernorm"),
    **scales("post_attention_residual_scale"),
    **tables.at("self_attn.qkv_proj.", {name: spec for name, spec in tables.ATTENTION.items() if name[0] in "qk"}),
    **tables.at("self_attn.", {name: spec for name, spec in tables.ATTENTION.items() if name[0] == "o"}),
    "self_attn.qkv_proj.v_proj_current.weight": "mixer.w_v: X D -> D 0 X",
    "self_attn.qkv_proj.v_proj_delayed.weight": "mixer.w_v: X D -> D 1 X",
    "self_attn.qkv_proj.v_proj_current.bias": "mixer.b_v: X -> 0 X",
    "self_attn.qkv_proj.v_proj_delayed.bias": "mixer.b_v: X -> 1 X",
    **tables.at(
        "self_attn.qkv_proj.",
        {
            **convolution("conv_qk_depthwise", "conv", "(H P) 1 W -> H P W"),
            **convolution("conv_qk_grouped", "heads", "(H P) Q U -> Q U H P"),
        },
    ),
    "self_attn.qk_norm.temp": "mixer.key_scale: K",
}
EXPERTS = {
    **tables.norm("post_attention_layernorm"),
    **scales("post_mlp_residual_scale"),
    "mlp.gate.down_proj.weight": "mixer.router_in: R D -> D R",
    "mlp.gate.down_proj.bias": "mixer.router_in_bias: R",
    "mlp.gate.router_states_scale": "mixer.state_scale: R",
    "mlp.gate.balancing_biases": "mixer.selection_bias: E",
    "mlp.gate.router_mlp.norm.weight": "mixer.router_norm.weight: R",
    "mlp.gate.router_mlp.fc1.weight": "mixer.fc1: S R -> R S",
    "mlp.gate.router_mlp.fc1.bias": "mixer.fc1_bias: S",
    "mlp.gate.router_mlp.fc2.weight": "mixer.fc2: S R -> R S",
    "mlp.gate.router_mlp.fc2.bias": "mixer.fc2_bias: S",
    "mlp.gate.router_mlp.out_proj.weight": "mixer.router_out: E R -> R E",
    "mlp.experts.gate_up_proj": "mixer.w_in: E (c F) D -> E D c F",
    "mlp.experts.down_proj": "mixer.w_out: E D F -> E F D",
}
FAMILY = Family(
    model_type="zaya",
    architecture="ZayaForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top={
        **tables.top("model.embed_tokens", "model.norm"),
        "model.input_hidden_states_scale": "embedding_scales.scale: D -> 0 D",
        "model.input_hidden_states_bias": "embedding_scales.bias: D -> 0 D",
    },
    layers={"*": ATTENTION, "w": ATTENTION, "e": EXPERTS, "E": EXPERTS},
)
