# SPDX-License-Identifier: Apache-2.0
"""Jamba: Mamba-1 or attention without positions, then an MLP or a mixture of them (Lieber et al. 2024)."""

from hybridlm.hf.families import common, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention, InnerNorm, Mamba1, MoE, Router
from hybridlm.model.config import ModelConfig


def read(keys: Keys) -> ModelConfig:
    keys.carry("use_mamba_kernels", "use_mambapy", "use_associative_scan", "output_router_logits", "layer_types")
    keys.carry("layers_block_type", "layers_num_experts", "calc_logits_for_entire_prompt", "n_ctx")
    keys.only("mamba_inner_layernorms", True)
    keys.only("attention_dropout", 0.0, 0)
    rank, n_layers = keys("mamba_dt_rank", "auto"), keys("num_hidden_layers", 32)
    activation = keys("hidden_act", "silu")
    mamba = Mamba1(
        d_state=keys("mamba_d_state", 16), expand=keys("mamba_expand", 2), dt_rank=None if rank == "auto" else rank,
        d_conv=keys("mamba_d_conv", 4), conv_bias=keys("mamba_conv_bias", True),
        proj_bias=keys("mamba_proj_bias", False), activation=keys.choose("hidden_act", common.PLAIN, "silu"),
        inner_norm=InnerNorm(learned=True, eps=keys("rms_norm_eps", 1e-6)),
    )  # fmt: skip
    keys.only("hidden_act", *common.GATED, default=activation)
    d_ff, n_experts = keys("intermediate_size", 14336), keys("num_local_experts", None) or keys("num_experts", 16)
    top_k, weight = keys("num_experts_per_tok", 2), keys("router_aux_loss_coef", 0.001)
    mlp = MLP(d_ff, common.GATED[activation])
    experts = mlp
    if n_experts > 1:
        experts = MoE(n_experts, d_ff, mlp.activation, Router(top_k), balance_weight=weight, z_weight=0.0)
    blocks = {"M": mamba, "*": Attention(**common.heads(keys, n_kv_heads=8), rope=None), "-": mlp, "E": experts}
    attends, mixes = (
        (keys(f"{name}_layer_period", period), keys(f"{name}_layer_offset", offset))
        for name, period, offset in (("attn", 8, 4), ("expert", 2, 1))
    )
    for name, (every, offset) in (("attn", attends), ("expert", mixes)):
        keys.require(offset < every, f"{name}_layer_offset ({offset}) must be below {name}_layer_period ({every})")
    pattern = "".join(
        ("*" if i % attends[0] == attends[1] else "M") + ("E" if n_experts > 1 and i % mixes[0] == mixes[1] else "-")
        for i in range(n_layers)
    )
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-6, 65536, False),
        pattern=pattern, blocks={symbol: blocks[symbol] for symbol in dict.fromkeys(pattern)},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    mamba = common.block(config, Mamba1, Mamba1(inner_norm=InnerNorm()))
    attention = common.block(config, Attention, Attention(rope=None))
    experts = common.block(config, MoE, MoE(1, 1, router=Router(1)))
    mlp = common.block(config, MLP, MLP(experts.d_ff, experts.activation))
    blocks = [config.blocks[symbol] for symbol in config.pattern]
    attends = period([isinstance(block, Attention) for block in blocks[::2]])
    mixes = period([isinstance(block, MoE) for block in blocks[1::2]])
    return {
        **common.write_widths(config, "rms_norm_eps"),
        **common.write_heads(attention),
        "mamba_d_state": mamba.d_state, "mamba_expand": common.whole(mamba.expand), "mamba_d_conv": mamba.d_conv,
        "mamba_dt_rank": mamba.rank(config.d_model), "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.proj_bias, "hidden_act": common.name_of(common.GATED, mlp.activation),
        "intermediate_size": mlp.d_ff, "num_experts": experts.n_experts, "num_experts_per_tok": experts.router.top_k,
        "router_aux_loss_coef": experts.balance_weight, "attn_layer_period": attends[0],
        "attn_layer_offset": attends[1], "expert_layer_period": mixes[0], "expert_layer_offset": mixes[1],
        "num_hidden_layers": len(blocks) // 2,
    }  # fmt: skip


def period(marked: list[bool]) -> tuple[int, int]:
    """(period, offset) of the layers that are marked; of none a period that is too long for one."""
    choices = [(n, offset) for n in range(1, len(marked) + 2) for offset in range(n)]
    fits = lambda n, offset: [i % n == offset for i in range(len(marked))] == marked
    return next((choice for choice in choices if fits(*choice)), (1, 0))


MLP_NORM = {"pre_ff_layernorm.weight": "norm.weight: D"}
NORM = {"input_layernorm.weight": "norm.weight: D"}
FAMILY = Family(
    model_type="jamba",
    architecture="JambaForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=tables.top("model.embed_tokens", "model.final_layernorm"),
    layers={
        "M": {**NORM, **tables.at("mamba.", tables.MAMBA1)},
        "*": {**NORM, **tables.at("self_attn.", tables.ATTENTION)},
        "-": {**MLP_NORM, **tables.at("feed_forward.", tables.GATED_MLP)},
        "E": {
            **MLP_NORM,
            "feed_forward.router.weight": "mixer.router: E D -> D E",
            "feed_forward.experts.{e}.gate_proj.weight": "mixer.w_in: F D -> e D 0 F",
            "feed_forward.experts.{e}.up_proj.weight": "mixer.w_in: F D -> e D 1 F",
            "feed_forward.experts.{e}.down_proj.weight": "mixer.w_out: D F -> e F D",
        },
    },
)
