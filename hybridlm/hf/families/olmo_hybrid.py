# SPDX-License-Identifier: Apache-2.0
"""OLMo Hybrid: Gated DeltaNet, then a gated MLP, each behind a norm; or attention, then one, each before a norm.

Without rope_parameters, or with a rope_theta of null, there are no positions. (transformers 5.24 reads a missing or
null rope_parameters as those of its default base, so what is written here is a rope_theta of null.) It also writes the
convolutions of queries, keys and values cut into three parts of one size, whatever their widths are.
"""

from hybridlm.hf.families import common, rope, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention, GatedDeltaNet
from hybridlm.model.config import ModelConfig


def read(keys: Keys) -> ModelConfig:
    n_layers = keys("num_hidden_layers", 32)
    types = common.layer_types(keys, "layer_types", n_layers=n_layers) or default_types(n_layers)
    pattern = common.as_pattern(keys, types, {"linear_attention": "D-", "full_attention": "*="})
    mlp = MLP(keys("intermediate_size", 11008), keys.choose("hidden_act", common.GATED, "silu"))
    blocks = {"D": read_delta(keys), "*": read_attention(keys), "-": mlp, "=": mlp}
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-6, 100352, False, 3840),
        pattern=pattern, blocks={symbol: blocks[symbol] for symbol in dict.fromkeys(pattern)},
        norm_before="D-" if "D" in pattern else "", norm_after="*=" if "*" in pattern else "",
    )  # fmt: skip


def default_types(n_layers: int) -> list[str]:
    """Every fourth layer is attention; of fewer than four the last."""
    types = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(n_layers)]
    return types if "full_attention" in types else [*types[:-1], "full_attention"]


def read_delta(keys: Keys) -> GatedDeltaNet:
    """Its keys start with linear_. The norm of the output has an epsilon of its own."""
    H, D = keys("num_attention_heads", 30), keys("hidden_size", 3840)
    G = keys.some("linear_num_key_heads", H)
    N = keys.some("linear_key_head_dim", int(0.75 * D / G))
    low, high = keys("linear_a_log_min", 0.0), keys("linear_a_log_max", 16.0)
    return GatedDeltaNet(
        n_heads=keys.some("linear_num_value_heads", H), n_key_heads=G, d_key=N,
        d_head=keys.some("linear_value_head_dim", 2 * N), d_conv=keys("linear_conv_kernel_dim", 4),
        activation=keys.choose("hidden_act", common.PLAIN, "silu"),
        neg_eigval=keys("linear_allow_neg_eigval", True), norm_eps=1e-5,
        dt_min=keys("linear_dt_min", 1e-3), dt_max=keys("linear_dt_max", 0.1),
        dt_init_floor=keys("linear_dt_init_floor", 1e-4), A_init=(max(low, 1e-4), max(high, 1e-4)),
    )  # fmt: skip


def read_attention(keys: Keys) -> Attention:
    """Norms of all queries and of all keys together."""
    given = keys("rope_parameters", None)
    no_positions = given.get("rope_theta", 0.0) is None if given else not keys.values.get("rope_theta")
    bias = keys("attention_bias", False)
    if no_positions:
        keys.carry("rope_theta", "rope_scaling")
    return Attention(
        **common.heads(keys, 30), rope=None if no_positions else rope.read(keys, 65536), qkv_bias=bias, out_bias=bias,
        qk_norm=True, qk_norm_eps=keys("rms_norm_eps", 1e-6), qk_norm_over="all",
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    attention, mlp = common.block(config, Attention), common.block(config, MLP)
    delta, types = common.block(config, GatedDeltaNet), common.kinds(config)
    positions = {"rope_theta": None, "rope_type": "default"} if attention.rope is None else rope.write(attention.rope)
    heads = common.write_heads(attention)
    if attention.n_heads * attention.d_head == config.d_model:
        del heads["head_dim"]  # the config class has no such key
    return {
        **common.write_widths(config, "rms_norm_eps"), **heads,
        "rope_parameters": positions, "attention_bias": attention.qkv_bias,
        "hidden_act": common.name_of(common.GATED, mlp.activation), "intermediate_size": mlp.d_ff,
        "num_hidden_layers": len(types) // 2, "layer_types": types[::2],
        "linear_num_value_heads": delta.n_heads, "linear_num_key_heads": delta.key_heads,
        "linear_key_head_dim": delta.d_key, "linear_value_head_dim": delta.d_head,
        "linear_conv_kernel_dim": delta.d_conv, "linear_allow_neg_eigval": delta.neg_eigval,
        "linear_a_log_min": delta.A_init[0], "linear_a_log_max": delta.A_init[1], "linear_dt_min": delta.dt_min,
        "linear_dt_max": delta.dt_max, "linear_dt_init_floor": delta.dt_init_floor,
    }  # fmt: skip


DELTA = {
    "q_proj.weight": "mixer.in_q: (G N) D -> D G N",
    "k_proj.weight": "mixer.in_k: (G N) D -> D G N",
    "v_proj.weight": "mixer.in_v: (H P) D -> D H P",
    "g_proj.weight": "mixer.in_z: (H P) D -> D H P",
    "b_proj.weight": "mixer.in_ba: H D -> D 0 H",
    "a_proj.weight": "mixer.in_ba: H D -> D 1 H",
    "o_norm.weight": "mixer.norm: P",
    "o_proj.weight": "mixer.out: D (H P) -> H P D",
    "A_log": "mixer.A_log: H",
    "dt_bias": "mixer.dt_bias: H",
    **tables.CONV_QKV,
}
CONV_QKV = tuple(f"linear_attn.{name}" for name in tables.CONV_QKV)
FAMILY = Family(
    model_type="olmo_hybrid",
    architecture="OlmoHybridForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=tables.top("model.embed_tokens", "model.norm"),
    layers={
        "D": {"attention_layer_norm.weight": "norm.weight: D", **tables.at("linear_attn.", DELTA)},
        "-": {"feedforward_layer_norm.weight": "norm.weight: D", **tables.at("mlp.", tables.GATED_MLP)},
        "*": {
            "post_attention_layernorm.weight": "after_norm.weight: D",
            **tables.at("self_attn.", tables.ATTENTION_NORMED_AS_ONE),
        },
        "=": {"post_feedforward_layernorm.weight": "after_norm.weight: D", **tables.at("mlp.", tables.GATED_MLP)},
    },
    recut=(CONV_QKV,),
    other_names=(
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),  # as transformers writes it of attention layers
        (r"\.post_attention_layernorm\.", ".feedforward_layer_norm."),
        (r"\.input_layernorm\.", ".attention_layer_norm."),
    ),
)
