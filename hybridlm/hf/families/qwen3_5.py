# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5, its text: as Qwen3-Next, with a gated MLP in every layer and projections that stand apart.

Positions of three kinds (`mrope`) are one and the same for text. Of a checkpoint that sees (`qwen3_5`) the language
model is read, and written as one of text alone (`qwen3_5_text`).
"""

from collections.abc import Callable
from dataclasses import replace

from hybridlm.hf.families import common, qwen3_next, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention, GatedDeltaNet
from hybridlm.model.config import ModelConfig


def read(keys: Keys) -> ModelConfig:
    mlp = MLP(keys("intermediate_size", 12288), keys.choose("hidden_act", common.GATED, "silu"))
    return read_layers(keys, "-", mlp, n_layers=32, n_kv_heads=4, d_model=4096)


def read_layers(keys: Keys, symbol: str, mlp, *, n_layers: int, n_kv_heads: int, d_model: int) -> ModelConfig:
    """What Qwen3.5 and Qwen3.5-MoE have in common. symbol, mlp: the second sublayer of a layer; others: defaults."""
    keys.only("attn_output_gate", True)
    keys.only("output_gate_type", "swish", "silu")
    keys.only("mlp_only_layers", None, [])
    keys.carry("mamba_ssm_dtype", "language_model_only")
    keys.derived("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")  # prediction of several tokens is left out
    for name in ("rope_parameters", "rope_scaling"):
        if values := keys.values.get(name):
            keys.values[name] = {k: v for k, v in values.items() if k not in ("mrope_section", "mrope_interleaved")}
    types = qwen3_next.read_types(keys, keys("num_hidden_layers", n_layers))
    symbols = {kind: mixer + symbol for kind, mixer in qwen3_next.SYMBOLS.items()}
    pattern = common.as_pattern(keys, types, symbols)
    blocks = {"D": qwen3_next.read_delta(keys), "*": qwen3_next.read_attention(keys, n_kv_heads), symbol: mlp}
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-6, 248320, False, d_model), norm_offset=1.0,
        pattern=pattern, blocks={symbol: blocks[symbol] for symbol in dict.fromkeys(pattern)},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    mlp = common.block(config, MLP)
    return {**write_layers(config, mlp.activation), "intermediate_size": mlp.d_ff}


def write_layers(config: ModelConfig, activation: str) -> dict:
    """The inverse of `read_layers`, but for the second sublayers' sizes. activation: theirs."""
    types = common.kinds(config)
    return {
        **common.write_widths(config, "rms_norm_eps"),
        **qwen3_next.write_attention(common.block(config, Attention, Attention(gate="elementwise"))),
        **qwen3_next.write_delta(common.block(config, GatedDeltaNet, GatedDeltaNet())),
        "hidden_act": common.name_of(common.GATED, activation),
        "num_hidden_layers": len(types) // 2,
        "layer_types": types[::2],
    }


DELTA = {
    **qwen3_next.CONV,
    "in_proj_qkv.weight": [
        "mixer.in_q: (G N) D -> D G N", "mixer.in_k: (G N) D -> D G N", "mixer.in_v: (H P) D -> D H P",
    ],
    "in_proj_z.weight": "mixer.in_z: (H P) D -> D H P",
    "in_proj_b.weight": "mixer.in_ba: H D -> D 0 H",
    "in_proj_a.weight": "mixer.in_ba: H D -> D 1 H",
}  # fmt: skip
FAMILY = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=qwen3_next.FAMILY.top,
    layers={
        "D": {**qwen3_next.NORM, **tables.at("linear_attn.", DELTA)},
        "*": qwen3_next.FAMILY.layers["*"],
        "-": qwen3_next.FAMILY.layers["-"],
    },
    skipped=qwen3_next.FAMILY.skipped,
)


def of_text(read: Callable[[Keys], ModelConfig]) -> Callable[[Keys], ModelConfig]:
    """`read` of a text_config, in a config.json that says how images are seen, too."""

    def read_outer(keys: Keys) -> ModelConfig:
        values, tied = keys("text_config"), keys("tie_word_embeddings", None)
        keys.require(isinstance(values, dict), "text_config is no JSON object")
        inner = Keys(values if tied is None else {**values, "tie_word_embeddings": tied}, f"{keys.where}: text_config")
        keys.carry("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        keys.carry("language_model_only")
        config = read(inner)
        inner.finish()
        return config

    return read_outer


SEEING = replace(
    FAMILY,
    model_type="qwen3_5",
    read=of_text(read),
    written_as="qwen3_5_text",
    aliases=(("model.language_model.", "model."),),
    skipped=(*FAMILY.skipped, r"^model\.visual\."),
)
