# SPDX-License-Identifier: Apache-2.0
"""LFM3: LFM2 with norms behind the mixers too, gated heads, and windows in some layers, each with its own rotation."""

from dataclasses import replace

from hybridlm.hf.families import common, lfm2, rope, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention, GatedConv, Proportional, Rope
from hybridlm.model.config import ModelConfig

ROPES = {"full_attention": Rope(1e6, 0.5, Proportional()), "sliding_attention": Rope(10_000.0)}
"""The class's rotations."""
SYMBOLS = {"conv": "C-", "full_attention": "*-", "sliding_attention": "w-"}


def read(keys: Keys) -> ModelConfig:
    if "rms_norm_eps" in keys.values:
        keys.values["norm_eps"] = keys.values.pop("rms_norm_eps")
    n_layers, width = keys("num_hidden_layers", 24), keys("sliding_window", 256)
    types = common.layer_types(keys, "layer_types", n_layers=n_layers)
    if types is None:
        names = {0: "sliding_attention", 2: "full_attention"}
        types = [names.get(i % 4, "conv") if i else "conv" for i in range(n_layers)]
    pattern = common.as_pattern(keys, types, SYMBOLS)
    bias, gate = keys("attention_bias", False), "head" if keys("use_attention_gate", True) else None
    ropes = rope.read_each(keys, 128_000, ROPES)
    missing = [kind for kind in ROPES if kind in types and kind not in ropes]
    keys.require(not missing, f"rope_parameters has no {', '.join(missing)}")
    attention = Attention(
        **common.heads(keys, n_heads=16, n_kv_heads=4, d_head=128), rope=ropes.get("full_attention"), qk_norm=True,
        qk_norm_eps=keys("norm_eps", 1e-5), gate=gate, qkv_bias=bias, out_bias=bias,
    )  # fmt: skip
    keys.require("w" not in pattern or width is not None, "layer_types ('sliding_attention') needs sliding_window")
    blocks = {
        "C": lfm2.read_conv(keys, 7),
        "*": attention,
        "w": replace(attention, rope=ropes.get("sliding_attention"), window=width),
        "-": MLP(keys("intermediate_size", 7680)),
    }
    blocks = {symbol: block for symbol, block in blocks.items() if symbol in pattern}
    return ModelConfig(
        **common.widths(keys, "norm_eps", 1e-5, 128_000, True, d_model=2048),
        norm_after="".join(blocks) if keys("use_sandwich_norm", True) else "", pattern=pattern, blocks=blocks,
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    found = [config.blocks[symbol] for symbol in config.pattern[::2]]
    full = next((b for b in found if isinstance(b, Attention) and b.window is None), None)
    slides = next((b for b in found if isinstance(b, Attention) and b.window is not None), None)
    attention = full or slides or Attention(qk_norm=True, gate="head", rope=ROPES["full_attention"])
    conv = common.block(config, GatedConv, GatedConv(7))
    kinds = [
        "conv" if isinstance(b, GatedConv) else "sliding_attention" if getattr(b, "window", None) else "full_attention"
        for b in found
    ]
    ropes = {"full_attention": full, "sliding_attention": slides}
    ropes = {kind: rope.required(of) if of else ROPES[kind] for kind, of in ropes.items()}
    return {
        **common.write_widths(config, "norm_eps"),
        **common.write_heads(attention),
        "rope_parameters": {kind: rope.write(of) for kind, of in ropes.items()},
        "attention_bias": attention.qkv_bias, "use_attention_gate": attention.gate is not None,
        "sliding_window": slides.window if slides else 256, "use_sandwich_norm": bool(config.norm_after),
        "conv_L_cache": conv.d_conv, "conv_bias": conv.bias, "intermediate_size": common.block(config, MLP).d_ff,
        "num_hidden_layers": len(kinds), "layer_types": kinds,
    }  # fmt: skip


AFTER = {"post_operator_norm.weight": "after_norm.weight: D"}
ATTENTION = {
    **lfm2.NORM,
    **AFTER,
    **tables.at("self_attn.", tables.ATTENTION),
    "self_attn.gate_proj.weight": "mixer.w_gate: H D -> D H",
}
FAMILY = Family(
    model_type="lfm3",
    architecture="Lfm3ForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=lfm2.FAMILY.top,
    layers={
        "C": {**lfm2.LAYERS["C"], **AFTER},
        "*": ATTENTION,
        "w": ATTENTION,
        "-": {**lfm2.LAYERS["-"], "post_ffn_norm.weight": "after_norm.weight: D"},
    },
    other_names=((r"\.self_attn\.g_proj\.", ".self_attn.gate_proj."),),  # as the published implementation holds it
)
