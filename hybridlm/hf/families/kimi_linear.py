# SPDX-License-Identifier: Apache-2.0
"""Kimi Linear: Kimi Delta Attention or latent attention without positions, then a gated MLP or a mixture of them."""

from typing import Any

from hybridlm.hf.families import common, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, KimiDelta, LatentAttention, MoE, Router
from hybridlm.model.config import ModelConfig

OTHER_KEYS = {
    "norm_topk_prob": "moe_renormalize", "n_group": "num_expert_group", "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token", "n_shared_experts": "num_shared_experts",
}  # fmt: skip
"""Keys as the config class calls them -> as files do."""


def read(keys: Keys) -> ModelConfig:
    rename(keys)
    keys.only("mla_use_nope", True)
    keys.only("use_grouped_topk", True, None)
    keys.carry("rope_theta", "rope_scaling")  # there are no positions
    n_layers = keys("num_hidden_layers", 27)
    linear = Keys(keys("linear_attn_config", None) or {}, f"{keys.where}: linear_attn_config")
    mixers = common.as_pattern(
        keys, read_types(keys, linear, n_layers), {"linear_attention": "K", "full_attention": "*"}
    )
    N = linear("head_dim", keys("linear_head_dim", 128))
    activation = keys.choose("hidden_act", common.PLAIN, "silu")
    kimi = KimiDelta(
        n_heads=linear("num_heads", keys("linear_num_heads", 32)), d_key=N, d_head=N, decay_rank=N, gate_rank=N,
        d_conv=linear("short_conv_kernel_size", keys("linear_conv_kernel_dim", 4)), activation=activation,
        norm_eps=keys("rms_norm_eps", 1e-5),
    )  # fmt: skip
    linear.finish()
    return read_layers(keys, mixers, "K", kimi, read_latent(keys), defaults={
        "hidden_size": 2304, "intermediate_size": 9216, "moe_intermediate_size": 1024, "num_experts": 256,
        "num_expert_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "first_k_dense_replace": 1,
        "vocab_size": 163840, "rms_norm_eps": 1e-5,
    })  # fmt: skip


def rename(keys: Keys) -> None:
    """Gives keys the names that files have."""
    for other, name in OTHER_KEYS.items():
        if other in keys.values:
            keys.values.setdefault(name, keys.values.pop(other))
    if (length := keys.values.get("model_max_length")) is not None:
        keys.values.setdefault("max_position_embeddings", length)
    keys.carry("model_max_length", "pretraining_tp", "output_router_logits")


def read_types(keys: Keys, linear: Keys, n_layers: int) -> list[str]:
    """Layer types: given, or by numbers from 1 in linear_attn_config, or of every fourth layer behind the first."""
    attends, deltas = linear("full_attn_layers", None), linear("kda_layers", None)
    types = common.layer_types(keys, "layer_types", n_layers=n_layers)
    if types is None and attends is not None and deltas is not None:
        by_number = dict.fromkeys(deltas, "linear_attention") | dict.fromkeys(attends, "full_attention")
        known = sorted(by_number) == list(range(1, n_layers + 1))
        linear.require(known, f"kda_layers and full_attn_layers do not name each of the {n_layers} layers from 1 on")
        types = [by_number[i + 1] for i in range(n_layers)]
    return types or ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(n_layers)]


def read_latent(keys: Keys) -> LatentAttention:
    """Latent attention, without positions and gate. Its norms have an epsilon of their own."""
    H = keys("num_attention_heads", 32)
    keys.carry("num_key_value_heads")  # each head makes its own keys and values of the latent
    keys.only("attention_dropout", 0.0, 0, None)
    keys.derived("qk_head_dim", "head_dim")
    return LatentAttention(
        n_heads=H, d_nope=keys("qk_nope_head_dim", 128), d_rope=keys("qk_rope_head_dim", 64),
        d_value=keys.some("v_head_dim", 128), kv_rank=keys("kv_lora_rank", 512), q_rank=keys("q_lora_rank", None),
        rope=None, norm_eps=1e-6, bias=keys("attention_bias", False),
    )  # fmt: skip


def write_latent(latent: LatentAttention) -> dict:
    """The inverse of `read_latent`."""
    return {
        "num_attention_heads": latent.n_heads, "num_key_value_heads": latent.n_heads,
        "qk_nope_head_dim": latent.d_nope, "qk_rope_head_dim": latent.d_rope, "v_head_dim": latent.d_value,
        "kv_lora_rank": latent.kv_rank, "q_lora_rank": latent.q_rank, "attention_bias": latent.bias,
    }  # fmt: skip


def read_layers(
    keys: Keys, mixers: str, symbol: str, delta: KimiDelta, latent, *, defaults: dict[str, Any]
) -> ModelConfig:
    """What Kimi Linear and Ling have in common: the second sublayer of each layer, and widths."""
    value = lambda name: keys(name, defaults[name])
    keys.only("moe_router_activation_func", "sigmoid")
    keys.only("moe_layer_freq", 1)
    keys.only("topk_method", "noaux_tc")
    activation = keys.choose("hidden_act", common.GATED, "silu")
    router = Router(
        keys.some("num_experts_per_token", 8), "sigmoid", renormalise=keys("moe_renormalize", True),
        scaling=float(value("routed_scaling_factor")), selection_bias=True, n_groups=value("num_expert_group"),
        top_groups=keys.some("topk_group", defaults["topk_group"]),
    )  # fmt: skip
    d_ff, n_shared, dense = (
        value("moe_intermediate_size"),
        keys("num_shared_experts", 1),
        value("first_k_dense_replace"),
    )
    keys.require(n_shared > 0, f"num_shared_experts ({n_shared}) must be positive")
    shared = MLP(n_shared * d_ff, activation)
    blocks = {
        symbol: delta, "*": latent, "-": MLP(value("intermediate_size"), activation),
        "E": MoE(value("num_experts"), d_ff, activation, router, shared, balance_weight=1e-4, z_weight=0.0),
    }  # fmt: skip
    kinds = keys("mlp_layer_types", None) or ["dense" if i < dense else "sparse" for i in range(len(mixers))]
    keys.require(
        len(kinds) == len(mixers),
        f"num_hidden_layers ({len(mixers)}) is not the length of mlp_layer_types ({len(kinds)})",
    )
    for kind in kinds:
        keys.require(kind in ("dense", "sparse"), f"mlp_layer_types ({kind!r}) is not supported: only dense, sparse")
    pattern = "".join(mixer + ("-" if kind == "dense" else "E") for mixer, kind in zip(mixers, kinds, strict=True))
    widths = common.widths(keys, "rms_norm_eps", defaults["rms_norm_eps"], defaults["vocab_size"], False)
    return ModelConfig(
        **widths | {"d_model": value("hidden_size")},
        pattern=pattern, blocks={symbol: blocks[symbol] for symbol in dict.fromkeys(pattern)},
    )  # fmt: skip


def write_layers(config: ModelConfig) -> dict:
    """The inverse of `read_layers`."""
    moe, types = common.block(config, MoE, False), common.kinds(config)
    mlp = common.block(config, MLP, common.expect(moe.shared, MLP) if moe else None)
    experts = {}
    if moe:
        router, shared = moe.router, common.expect(moe.shared, MLP)
        experts = {
            "num_experts": moe.n_experts, "num_experts_per_token": router.top_k, "moe_intermediate_size": moe.d_ff,
            "num_shared_experts": max(1, shared.d_ff // moe.d_ff), "moe_renormalize": router.renormalise,
            "routed_scaling_factor": router.scaling, "num_expert_group": router.n_groups,
            "topk_group": router.top_groups,
        }  # fmt: skip
    return {
        **common.write_widths(config, "rms_norm_eps"), **experts,
        "hidden_act": common.name_of(common.GATED, mlp.activation), "intermediate_size": mlp.d_ff,
        "num_hidden_layers": len(types) // 2, "layer_types": types[::2],
        "mlp_layer_types": ["sparse" if kind == "moe" else "dense" for kind in types[1::2]],
    }  # fmt: skip


def write(config: ModelConfig) -> dict:
    kimi = common.block(config, KimiDelta, KimiDelta())
    return {
        **write_layers(config),
        **write_latent(common.block(config, LatentAttention, LatentAttention(rope=None))),
        "linear_head_dim": kimi.d_head, "linear_num_heads": kimi.n_heads, "linear_conv_kernel_dim": kimi.d_conv,
    }  # fmt: skip


NORM = {"input_layernorm.weight": "norm.weight: D"}
MLP_NORM = {"post_attention_layernorm.weight": "norm.weight: D"}
KIMI_DELTA = {
    **tables.KIMI_DELTA,
    "A_log": "mixer.A_log: 1 1 H 1 -> H",
    "f_a_proj.weight": "mixer.in_decay: R D -> D R",
    "f_b_proj.weight": "mixer.decay: (H N) R -> R H N",
    "g_a_proj.weight": "mixer.in_gate: R D -> D R",
    "g_b_proj.weight": "mixer.gate: (H P) R -> R H P",
}
EXPERTS = {
    "gate.weight": "mixer.router: E D -> D E",
    "gate.e_score_correction_bias": "mixer.selection_bias: E",
    "experts.{e}.w1.weight": "mixer.w_in: F D -> e D 0 F",
    "experts.{e}.w3.weight": "mixer.w_in: F D -> e D 1 F",
    "experts.{e}.w2.weight": "mixer.w_out: D F -> e F D",
}
FAMILY = Family(
    model_type="kimi_linear",
    architecture="KimiLinearForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=tables.top("model.embed_tokens", "model.norm"),
    layers={
        "K": {**NORM, **tables.at("self_attn.", KIMI_DELTA)},
        "*": {**NORM, **tables.at("self_attn.", tables.LATENT_ATTENTION)},
        "-": {**MLP_NORM, **tables.at("mlp.", tables.GATED_MLP)},
        "E": {
            **MLP_NORM,
            **tables.at("block_sparse_moe.", EXPERTS),
            **tables.at("block_sparse_moe.shared_experts.", tables.GATED_MLP, "mixer.shared"),
        },
    },
    ties=False,
    other_names=((r"\.block_sparse_moe\.", ".mlp."), (r"\.mlp\.", ".block_sparse_moe.")),  # as transformers writes them
)
