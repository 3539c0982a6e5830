# SPDX-License-Identifier: Apache-2.0
"""Inkling, its text: attention with learned terms by distance, convolutions of keys, values and of the outputs of all
sublayers, and a mixture whose shared experts the router weighs (Thinking Machines 2026).

Layers that predict further tokens are left out.
"""

from hybridlm.hf.families import common, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, MoE, OutputConv, RelativeAttention, Router
from hybridlm.model.config import ModelConfig

SYMBOLS = {"hybrid": "*", "hybrid_sliding": "w"}
OLDER = {"sconv_kernel_size": "conv_kernel_size", "embedding_multiplier": "logits_mup_width_multiplier",
         "sliding_window": "sliding_window_size", "num_local_experts": "n_routed_experts"}  # fmt: skip
"""Names that files may have, too -> those of the published class."""


def read(keys: Keys) -> ModelConfig:
    for older, name in OLDER.items():
        if older in keys.values:
            keys.values[name] = keys.values.pop(older)
    keys.carry("model_max_length", "rms_norm_eps_moe_gate", "number_of_conv_states", "local_layer_ids")
    keys.derived("num_mtp_layers", "chain_hidden_post_norm", "mtp_hidden_states_first", "mtp_local_layer_ids")
    keys.only("tie_word_embeddings", False)
    for name in (
        "shared_expert_sink",
        "use_sconv",
        "use_embed_norm",
        "use_gate_bias",
        "use_global_scale",
        "norm_after_topk",
    ):
        keys.only(name, True)
    keys.only("gate_activation", "sigmoid")
    for name in ("q_bias", "o_bias", "final_logit_softcapping"):
        keys.only(name, None, False)
    keys.only("attention_dropout", 0.0, 0, None)
    n_layers, vocabulary = keys("num_hidden_layers", 66), keys("vocab_size", 201_024)
    taps = keys.some("conv_kernel_size", 4)
    keys.only("unpadded_vocab_size", None, vocabulary)
    attentions, experts = _read_attentions(keys, taps), _read_experts(keys, taps)
    types = common.layer_types(keys, "layer_types", n_layers=n_layers)
    if types is None:
        local = keys.values.get("local_layer_ids")
        slides = [i in local if local is not None else (i + 1) % 6 != 0 for i in range(n_layers)]
        types = ["hybrid_sliding" if here else "hybrid" for here in slides]
    mixers, kinds = common.as_pattern(keys, types, SYMBOLS), _read_kinds(keys, n_layers)
    pattern = "".join(mixer + kind for mixer, kind in zip(mixers, kinds, strict=True))
    blocks = attentions | experts
    divisor = float(keys("logits_mup_width_multiplier", 24.0))
    keys.require(divisor != 0, "logits_mup_width_multiplier (0) must not be 0")
    widths = {"vocab_size": vocabulary, "d_model": keys("hidden_size", 6144), "norm_eps": keys("rms_norm_eps", 1e-6)}
    return ModelConfig(
        **widths, init_std=keys("initializer_range", 0.02), tie_embeddings=False, embedding_norm=True,
        logit_multiplier=common.inverse(divisor), pattern=pattern,
        blocks={symbol: blocks[symbol] for symbol in dict.fromkeys(pattern)},
    )  # fmt: skip


def _read_kinds(keys: Keys, n_layers: int) -> list[str]:
    """Of each layer the symbol of its second sublayer; without mlp_layer_types the first dense_mlp_idx are dense."""
    types, n_dense = keys("mlp_layer_types", None), keys.some("dense_mlp_idx", 0)
    if types is None:
        return ["-" if i < n_dense else "E" for i in range(n_layers)]
    said = f"num_hidden_layers ({n_layers}) is not the length of mlp_layer_types ({len(types)})"
    keys.require(len(types) == n_layers, said)
    for kind in types:
        keys.require(kind in ("dense", "sparse"), f"mlp_layer_types ({kind!r}) is not supported: only dense, sparse")
    return ["-" if kind == "dense" else "E" for kind in types]


def _read_attentions(keys: Keys, taps: int) -> dict[str, OutputConv]:
    """By symbol: over all tokens, and over windows, which may have heads of their own."""
    width, floor = keys("sliding_window_size", 512), keys("log_scaling_n_floor", None)
    common_options = {"n_profiles": keys("d_rel", 16), "d_conv": taps, "norm_eps": keys("rms_norm_eps", 1e-6)}
    whole = RelativeAttention(
        keys("num_attention_heads", 64), keys("num_key_value_heads", 8), keys("head_dim", 128),
        extent=keys("rel_extent", 1024), log_floor=floor, log_scale=keys("log_scaling_alpha", 0.1), **common_options,
    )  # fmt: skip
    slides = RelativeAttention(
        keys("swa_num_attention_heads", 64), keys("swa_num_key_value_heads", 16), keys("swa_head_dim", 128),
        extent=width, window=width, **common_options,
    )  # fmt: skip
    return {"*": OutputConv(whole, taps), "w": OutputConv(slides, taps)}


def _read_experts(keys: Keys, taps: int) -> dict[str, OutputConv]:
    """By symbol: an MLP, and a mixture. Files that name the MLP's width apart mean the experts' by the other name."""
    if keys.values.get("dense_intermediate_size") is not None:
        keys.values["moe_intermediate_size"] = keys("intermediate_size")
        keys.values["intermediate_size"] = keys.values.pop("dense_intermediate_size")
    activation = keys.choose("hidden_act", common.GATED, "silu")
    router = Router(
        keys("num_experts_per_tok", 6), "sigmoid", renormalise=True, scaling=float(keys("route_scale", 8.0)),
        selection_bias=True,
    )  # fmt: skip
    moe = MoE(
        keys("n_routed_experts", 256), keys("moe_intermediate_size", 3072), activation, router,
        sinks=keys("n_shared_experts", 2), balance_weight=1e-4, z_weight=0.0,
    )  # fmt: skip
    keys.require(moe.sinks > 0, f"n_shared_experts ({moe.sinks}) must be positive")
    mlp = MLP(keys("intermediate_size", 24_576), activation)
    return {"-": OutputConv(mlp, taps, scaled=True), "E": OutputConv(moe, taps, scaled=True)}


def write(config: ModelConfig) -> dict:
    found = [common.expect(config.blocks[symbol], OutputConv) for symbol in config.pattern]
    attentions = [common.expect(block.mixer, RelativeAttention) for block in found[::2]]
    whole = next((a for a in attentions if a.window is None), None)
    slides = next((a for a in attentions if a.window is not None), None)
    any_one = whole or slides or RelativeAttention()
    moe = next((block.mixer for block in found[1::2] if isinstance(block.mixer, MoE)), None)
    mlp = next((block.mixer for block in found[1::2] if isinstance(block.mixer, MLP)), None)
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.d_model, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings, "initializer_range": config.init_std,
        "logits_mup_width_multiplier": common.inverse(config.logit_multiplier),
        **_write_heads("", whole or any_one), **_write_heads("swa_", slides or any_one),
        "sliding_window_size": slides.window if slides else 512, "d_rel": any_one.n_profiles,
        "rel_extent": whole.extent if whole else 1024, "conv_kernel_size": found[0].d_conv,
        "log_scaling_n_floor": whole.log_floor if whole else None,
        "log_scaling_alpha": whole.log_scale if whole and whole.log_floor else 0.1,
        "num_hidden_layers": len(attentions),
        "layer_types": ["hybrid" if a.window is None else "hybrid_sliding" for a in attentions],
        "mlp_layer_types": ["sparse" if isinstance(block.mixer, MoE) else "dense" for block in found[1::2]],
        "hidden_act": common.name_of(common.GATED, (moe or mlp or MLP()).activation),
        "intermediate_size": mlp.d_ff if mlp else 24_576,
        **(_write_experts(moe) if moe else {}),
    }  # fmt: skip


def _write_heads(prefix: str, attention: RelativeAttention) -> dict:
    """The inverse of a part of `_read_attentions`."""
    return {
        f"{prefix}num_attention_heads": attention.n_heads,
        f"{prefix}num_key_value_heads": attention.n_kv_heads,
        f"{prefix}head_dim": attention.d_head,
    }


def _write_experts(moe: MoE) -> dict:
    """The inverse of a part of `_read_experts`."""
    return {
        "n_routed_experts": moe.n_experts, "num_experts_per_tok": moe.router.top_k, "n_shared_experts": moe.sinks,
        "moe_intermediate_size": moe.d_ff, "route_scale": moe.router.scaling,
    }  # fmt: skip


PROJECTIONS = {name: spec for name, spec in tables.ATTENTION.items() if name.endswith("weight")}
ATTENTION = {
    **tables.norm("input_layernorm"),
    **tables.at("self_attn.", PROJECTIONS, "mixer.mixer"),
    "self_attn.r_proj.weight": "mixer.mixer.w_r: (H R) D -> D H R",
    "self_attn.k_sconv.conv1d.weight": "mixer.mixer.conv_k: (K P) 1 W -> K P W",
    "self_attn.v_sconv.conv1d.weight": "mixer.mixer.conv_v: (K P) 1 W -> K P W",
    "self_attn.rel_logits_proj.proj": "mixer.mixer.profiles: R E",
    "attn_sconv.conv1d.weight": "mixer.conv: D 1 W -> D W",
}
FEED_FORWARD = {
    **tables.norm("post_attention_layernorm"),
    "mlp_sconv.conv1d.weight": "mixer.conv: D 1 W -> D W",
}
FAMILY = Family(
    model_type="inkling_text",
    architecture="InklingForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top={
        **tables.top("model.embed_tokens", "model.norm"),
        "model.embed_tokens.embed_norm.weight": "embedding_norm.weight: D",
    },
    layers={
        "*": ATTENTION,
        "w": ATTENTION,
        "-": {
            **FEED_FORWARD,
            **tables.at("mlp.", tables.GATED_MLP, "mixer.mixer"),
            "mlp.global_scale": "mixer.scale: c",
        },
        "E": {
            **FEED_FORWARD,
            "mlp.gate.weight": "mixer.mixer.router: E D -> D E",
            "mlp.gate.e_score_correction_bias": "mixer.mixer.selection_bias: E",
            "mlp.gate.global_scale": "mixer.scale: c",
            **tables.at("mlp.experts.", tables.FUSED_EXPERTS, "mixer.mixer"),
            "mlp.shared_experts.gate_proj": "mixer.mixer.sink_in: J F D -> D 0 J F",
            "mlp.shared_experts.up_proj": "mixer.mixer.sink_in: J F D -> D 1 J F",
            "mlp.shared_experts.down_proj": "mixer.mixer.sink_out: J D F -> J F D",
        },
    },
    other_names=((r"^model\.embed_norm\.", "model.embed_tokens.embed_norm."),),  # of transformers 5.17
    skipped=(r"rotary_emb\.inv_freq$", r"^model\.mtp\."),
)
