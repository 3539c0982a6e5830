# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Next: Gated DeltaNet or gated attention, then a gated MLP or a mixture of them (Qwen Team 2025)."""

from hybridlm.hf.families import common, rope, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention, GatedDeltaNet, MoE, Router
from hybridlm.model.config import ModelConfig

SYMBOLS = {"linear_attention": "D", "full_attention": "*"}


def read(keys: Keys) -> ModelConfig:
    activation, n_layers = keys.choose("hidden_act", common.GATED, "silu"), keys("num_hidden_layers", 48)
    n_experts, every, dense = keys("num_experts", 512), keys("decoder_sparse_step", 1), keys("mlp_only_layers", None)
    experts = read_experts(keys, activation, n_experts, top_k=10, renormalise=keys("norm_topk_prob", True))
    mixes = [n_experts > 0 and i not in (dense or ()) and (i + 1) % every == 0 for i in range(n_layers)]
    blocks = {
        "D": read_delta(keys),
        "*": read_attention(keys, n_kv_heads=2),
        "-": MLP(keys("intermediate_size", 5632), activation),
        "E": experts,
    }
    mixers = common.as_pattern(keys, read_types(keys, n_layers), SYMBOLS)
    pattern = "".join(mixer + ("E" if mix else "-") for mixer, mix in zip(mixers, mixes, strict=True))
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-6, 151936, False, d_model=2048), norm_offset=1.0,
        pattern=pattern, blocks={symbol: blocks[symbol] for symbol in dict.fromkeys(pattern)},
    )  # fmt: skip


def read_types(keys: Keys, n_layers: int) -> list[str]:
    """Layer types; without them every fourth layer, or what full_attention_interval says, is attention."""
    every = keys.some("full_attention_interval", 4)
    types = common.layer_types(keys, "layer_types", n_layers=n_layers)
    return types or ["linear_attention" if (i + 1) % every else "full_attention" for i in range(n_layers)]


def read_delta(keys: Keys) -> GatedDeltaNet:
    """Its keys start with linear_."""
    return GatedDeltaNet(
        n_heads=keys("linear_num_value_heads", 32), n_key_heads=keys("linear_num_key_heads", 16),
        d_key=keys("linear_key_head_dim", 128), d_head=keys("linear_value_head_dim", 128),
        d_conv=keys("linear_conv_kernel_dim", 4), activation=keys.choose("hidden_act", common.PLAIN, "silu"),
        norm_eps=keys("rms_norm_eps", 1e-6),
    )  # fmt: skip


def write_delta(delta: GatedDeltaNet) -> dict:
    """The inverse of `read_delta`, but for what others write."""
    return {
        "linear_num_value_heads": delta.n_heads,
        "linear_num_key_heads": delta.key_heads,
        "linear_key_head_dim": delta.d_key,
        "linear_value_head_dim": delta.d_head,
        "linear_conv_kernel_dim": delta.d_conv,
    }


def read_attention(keys: Keys, n_kv_heads: int) -> Attention:
    """Gated attention with norms of each query and key, a quarter of the heads rotated."""
    bias = keys("attention_bias", False)
    return Attention(
        **common.heads(keys, 16, n_kv_heads, 256), rope=rope.read(keys, 32768, fraction=0.25), qkv_bias=bias,
        out_bias=bias, gate="elementwise", gate_bias=bias, qk_norm=True, qk_norm_eps=keys("rms_norm_eps", 1e-6),
        qk_norm_offset=1.0,
    )  # fmt: skip


def write_attention(attention: Attention) -> dict:
    """The inverse of `read_attention`."""
    return {
        **common.write_heads(attention),
        "attention_bias": attention.qkv_bias,
        "rope_parameters": rope.write(rope.required(attention), always=True),
    }


def read_experts(keys: Keys, activation: str, n_experts: int, top_k: int, renormalise: bool) -> MoE | None:
    """The mixture; None where there are no experts."""
    keys.carry("output_router_logits")
    d_ff, shared = keys("moe_intermediate_size", 512), MLP(keys("shared_expert_intermediate_size", 512), activation)
    router, weight = (
        Router(keys("num_experts_per_tok", top_k), renormalise=renormalise),
        keys.some("router_aux_loss_coef", 1e-3),
    )
    if not n_experts:
        return None
    return MoE(n_experts, d_ff, activation, router, shared, shared_gate=True, balance_weight=weight, z_weight=0.0)


def write_experts(moe: MoE) -> dict:
    """The inverse of `read_experts`."""
    shared = common.expect(moe.shared, MLP)
    return {
        "num_experts": moe.n_experts, "num_experts_per_tok": moe.router.top_k, "moe_intermediate_size": moe.d_ff,
        "shared_expert_intermediate_size": shared.d_ff, "router_aux_loss_coef": moe.balance_weight,
    }  # fmt: skip


def write(config: ModelConfig) -> dict:
    moe, types = common.block(config, MoE, False), common.kinds(config)
    mlp = common.block(config, MLP, common.expect(moe.shared, MLP) if moe else None)
    return {
        **common.write_widths(config, "rms_norm_eps"),
        **write_attention(common.block(config, Attention)),
        **write_delta(common.block(config, GatedDeltaNet)),
        **(write_experts(moe) if moe else {"num_experts": 0}),
        "norm_topk_prob": moe.router.renormalise if moe else True,
        "hidden_act": common.name_of(common.GATED, mlp.activation), "intermediate_size": mlp.d_ff,
        "num_hidden_layers": len(types) // 2, "layer_types": types[::2], "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, kind in enumerate(types[1::2]) if moe and kind == "mlp"],
    }  # fmt: skip


NORM = {"input_layernorm.weight": "norm.weight: D"}
MLP_NORM = {"post_attention_layernorm.weight": "norm.weight: D"}
CONV = {
    "conv1d.weight": [
        "mixer.conv_q: (G N) 1 W -> G N W", "mixer.conv_k: (G N) 1 W -> G N W", "mixer.conv_v: (H P) 1 W -> H P W",
    ],
    "A_log": "mixer.A_log: H", "dt_bias": "mixer.dt_bias: H",
    "norm.weight": "mixer.norm: P",
    "out_proj.weight": "mixer.out: D (H P) -> H P D",
}  # fmt: skip
DELTA = {
    **CONV,
    "in_proj_qkvz.weight": [
        "mixer.in_q: N D -> D g N", "mixer.in_k: N D -> D g N",
        "mixer.in_v: (r P) D -> D (g r) P", "mixer.in_z: (r P) D -> D (g r) P",
    ],
    "in_proj_ba.weight": [
        "mixer.in_ba: r D -> D 0 (g r); g of mixer.in_q 1", "mixer.in_ba: r D -> D 1 (g r); g of mixer.in_q 1",
    ],
}  # fmt: skip
"""Rows of all heads that share a key stand together: of q, k, v and z, and of b and a."""
SHARED_GATE = {"mlp.shared_expert_gate.weight": "mixer.shared_gate: s D -> D s"}
FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=tables.top("model.embed_tokens", "model.norm"),
    layers={
        "D": {**NORM, **tables.at("linear_attn.", DELTA)},
        "*": {**NORM, **tables.at("self_attn.", tables.GATED_ATTENTION)},
        "-": {**MLP_NORM, **tables.at("mlp.", tables.GATED_MLP)},
        "E": {
            **MLP_NORM,
            **tables.at("mlp.", tables.EXPERTS),
            **tables.at("mlp.shared_expert.", tables.GATED_MLP, "mixer.shared"),
            **SHARED_GATE,
        },
    },
    skipped=(r"rotary_emb\.inv_freq$", r"^mtp\."),
)
