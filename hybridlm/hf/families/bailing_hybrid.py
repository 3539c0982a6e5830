# SPDX-License-Identifier: Apache-2.0
"""Ling 3: Kimi Delta Attention or latent attention with a gate a head, then a gated MLP or a mixture of them."""

import math
from dataclasses import replace

from hybridlm.hf.families import common, kimi_linear, rope, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import KimiDelta, LatentAttention, Rope, YaRN
from hybridlm.model.config import ModelConfig

ONLY = {
    "no_kda_lora": True, "gated_attention_proj_granularity_type": "head_wise", "rope_interleave": True,
    "score_function": "sigmoid", "use_qkv_bias": False, "use_bias": False, "moe_router_enable_expert_bias": True,
    "linear_attention": "kda", "group_norm_size": 1, "use_rmsnorm": True, "embedding_dropout": 0.0,
    "output_dropout": 0.0,
}  # fmt: skip
"""Keys that files have and the config class has not -> the value that it stands for."""


def read(keys: Keys) -> ModelConfig:
    kimi_linear.rename(keys)
    keys.carry("mtp_loss_scaling_factor", "use_qk_norm", "router_dtype", "max_window_layers")
    keys.only("rotary_dim", keys("qk_rope_head_dim", 64), None)
    keys.derived("num_nextn_predict_layers", "num_mtp_layers")  # prediction of several tokens is left out
    for name, value in ONLY.items():
        keys.only(name, value, None)
    n_layers, every = keys("num_hidden_layers", 42), keys("layer_group_size", 6)
    types = common.layer_types(keys, "layer_types", n_layers=n_layers)
    types = types or ["linear_attention" if (i + 1) % every else "full_attention" for i in range(n_layers)]
    mixers = common.as_pattern(keys, types, {"linear_attention": "K", "full_attention": "*"})
    kimi = read_delta(keys)
    shared = keys("moe_shared_expert_intermediate_size", None)
    d_ff = keys("moe_intermediate_size", 768) * keys("num_shared_experts", 1)
    keys.require(
        shared in (None, d_ff), f"moe_shared_expert_intermediate_size ({shared}) is not supported: only {d_ff}"
    )
    return kimi_linear.read_layers(keys, mixers, "K", kimi, read_latent(keys), defaults={
        "hidden_size": 2560, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 512,
        "num_expert_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 2,
        "vocab_size": 157184, "rms_norm_eps": 1e-6,
    })  # fmt: skip


def read_delta(keys: Keys) -> KimiDelta:
    """Full projections of decays and gate; decays with a lower bound where kda_safe_gate says so."""
    N = keys("linear_head_dim", keys("head_dim", 128))
    safe, bound = keys("kda_safe_gate", True), keys("kda_lower_bound", -5.0)
    return KimiDelta(
        n_heads=keys("linear_num_heads", keys("num_attention_heads", 32)), d_key=N, d_head=N, decay_rank=None,
        gate_rank=None, lower_bound=float(bound) if safe else None,
        d_conv=keys("linear_conv_kernel_dim", keys("short_conv_kernel_size", 4)),
        activation=keys.choose("hidden_act", common.PLAIN, "silu"), norm_eps=keys("rms_norm_eps", 1e-6),
    )  # fmt: skip


def read_latent(keys: Keys) -> LatentAttention:
    """Kimi's, rotated and gated; with YaRN's mscale_all_dim the scores are scaled by its square."""
    latent, rotary = kimi_linear.read_latent(keys), rope.read(keys, 262144, 6_000_000.0)
    values = keys.values.get("rope_scaling") or keys.values.get("rope_parameters") or {}
    scale = None
    if isinstance(rotary.scaling, YaRN) and (weight := values.get("mscale_all_dim")):
        scale = (latent.d_nope + latent.d_rope) ** -0.5 * rotary.scaling.scale_times(weight) ** 2
    return replace(latent, rope=replace(rotary, interleaved=True), scale=scale, head_gate=True)


def write_rope(latent: LatentAttention) -> dict:
    """rope_parameters; of scores that are scaled, with the mscale_all_dim that this follows from."""
    rotary, plain = latent.rope or Rope(), (latent.d_nope + latent.d_rope) ** -0.5
    values, scale = rope.write(rotary), latent.scale or plain
    if isinstance(rotary.scaling, YaRN) and scale != plain and rotary.scaling.factor > 1:
        values["mscale_all_dim"] = (math.sqrt(scale / plain) - 1) / (rotary.scaling.scale_times(1.0) - 1)
    return values


def write(config: ModelConfig) -> dict:
    latent = common.block(config, LatentAttention, LatentAttention(head_gate=True))
    kimi = common.block(config, KimiDelta, KimiDelta(decay_rank=None, gate_rank=None, lower_bound=-5.0))
    return {
        **kimi_linear.write_layers(config),
        **kimi_linear.write_latent(latent),
        "rope_parameters": write_rope(latent), "rope_theta": (latent.rope or Rope()).theta,
        "linear_head_dim": kimi.d_head, "linear_num_heads": kimi.n_heads, "linear_conv_kernel_dim": kimi.d_conv,
        "short_conv_kernel_size": kimi.d_conv, "head_dim": latent.d_rope,
        "kda_safe_gate": kimi.lower_bound is not None, "kda_lower_bound": kimi.lower_bound or -5.0,
        "num_nextn_predict_layers": 0,
    }  # fmt: skip


KIMI_DELTA = {
    **tables.renamed(tables.KIMI_DELTA, "o_proj.", "dense."),
    "A_log": "mixer.A_log: H",
    "f_proj.weight": "mixer.decay: (H N) D -> D H N",
    "g_proj.weight": "mixer.gate: (H P) D -> D H P",
}
EXPERTS = {**tables.EXPERTS, "gate.expert_bias": "mixer.selection_bias: E"}
FAMILY = Family(
    model_type="bailing_hybrid",
    architecture="BailingHybridForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=tables.top("model.word_embeddings", "model.norm"),
    layers={
        "K": {**kimi_linear.NORM, **tables.at("attention.", KIMI_DELTA)},
        "*": {
            **kimi_linear.NORM,
            **tables.at("attention.", tables.renamed(tables.LATENT_ATTENTION, "o_proj.", "dense.")),
        },
        "-": kimi_linear.FAMILY.layers["-"],
        "E": {
            **kimi_linear.MLP_NORM,
            **tables.at("mlp.", EXPERTS),
            **tables.at("mlp.shared_experts.", tables.GATED_MLP, "mixer.shared"),
        },
    },
    ties=False,
    extra_layers=True,
)
