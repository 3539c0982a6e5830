# SPDX-License-Identifier: Apache-2.0
"""LFM2 with experts: as LFM2, in all layers but the first ones a mixture of them in place of the MLP."""

from dataclasses import replace

from hybridlm.hf.families import common, lfm2
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, MoE, Router
from hybridlm.model.config import ModelConfig


def read(keys: Keys) -> ModelConfig:
    for older, name in lfm2.OLDER.items():
        if older in keys.values:
            keys.values[name] = keys.values.pop(older)
    keys.carry("output_router_logits", *lfm2.UNREAD)
    n_layers, n_dense = keys("num_hidden_layers", 32), keys("num_dense_layers", 2)
    types = common.layer_types(keys, "layer_types", n_layers=n_layers)
    keys.require(types is not None, "layer_types is missing")
    mixers = common.as_pattern(keys, types, {"conv": "C", "full_attention": "*"})
    pattern = "".join(mixer + ("-" if i < n_dense else "E") for i, mixer in enumerate(mixers))
    router = Router(
        keys("num_experts_per_tok", 4), "sigmoid", renormalise=keys("norm_topk_prob", True), renormalise_eps=1e-6,
        scaling=float(keys("routed_scaling_factor", 1.0)), selection_bias=keys("use_expert_bias", True),
    )  # fmt: skip
    n_experts, d_expert = keys("num_experts", 32), keys("moe_intermediate_size", 1792)
    blocks = {
        "C": lfm2.read_conv(keys, 3),
        "*": lfm2.read_attention(keys),
        "-": MLP(keys("intermediate_size", 7168)),
        "E": MoE(n_experts, d_expert, router=router, balance_weight=1e-4, z_weight=0.0),
    }
    return ModelConfig(
        **common.widths(keys, "norm_eps", 1e-5, 65536, True, d_model=2048),
        pattern=pattern, blocks={symbol: block for symbol, block in blocks.items() if symbol in pattern},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    moe, mlp = common.block(config, MoE), common.block(config, MLP, MLP(1))
    router = moe.router
    return {
        **lfm2.write_mixers(config),
        "intermediate_size": mlp.d_ff, "num_experts": moe.n_experts, "moe_intermediate_size": moe.d_ff,
        "num_experts_per_tok": router.top_k, "norm_topk_prob": router.renormalise,
        "routed_scaling_factor": router.scaling, "use_expert_bias": router.selection_bias,
        "num_dense_layers": common.kinds(config)[1::2].count("mlp"),
    }  # fmt: skip


FAMILY = replace(
    lfm2.FAMILY, model_type="lfm2_moe", architecture="Lfm2MoeForCausalLM", read=read, write=write,
    layers={
        **lfm2.LAYERS,
        "E": {
            **lfm2.MLP_NORM,
            "feed_forward.gate.weight": "mixer.router: E D -> D E",
            "feed_forward.expert_bias": "mixer.selection_bias: E",
            "feed_forward.experts.{e}.w1.weight": "mixer.w_in: F D -> e D 0 F",
            "feed_forward.experts.{e}.w3.weight": "mixer.w_in: F D -> e D 1 F",
            "feed_forward.experts.{e}.w2.weight": "mixer.w_out: D F -> e F D",
        },
    },
)  # fmt: skip
