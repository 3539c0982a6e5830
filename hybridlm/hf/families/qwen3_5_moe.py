# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5-MoE, its text: Qwen3.5 with a mixture of experts, one of them shared, in every layer."""

from dataclasses import replace

from hybridlm.hf.families import common, qwen3_5, qwen3_next, tables
from hybridlm.hf.keys import Keys
from hybridlm.layers import MoE
from hybridlm.model.config import ModelConfig


def read(keys: Keys) -> ModelConfig:
    keys.only("norm_topk_prob", True)
    keys.carry("intermediate_size")  # of layers without experts, which there are none of
    activation, n_experts = keys.choose("hidden_act", common.GATED, "silu"), keys("num_experts", 256)
    keys.require(n_experts > 0, f"num_experts ({n_experts}) must be positive")
    moe = qwen3_next.read_experts(keys, activation, n_experts, top_k=8, renormalise=True)
    return qwen3_5.read_layers(keys, "E", moe, n_layers=40, n_kv_heads=2, d_model=2048)


def write(config: ModelConfig) -> dict:
    moe = common.block(config, MoE)
    return {**qwen3_5.write_layers(config, moe.activation), **qwen3_next.write_experts(moe)}


FAMILY = replace(
    qwen3_5.FAMILY,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    read=read,
    write=write,
    layers={
        "D": qwen3_5.FAMILY.layers["D"],
        "*": qwen3_5.FAMILY.layers["*"],
        "E": qwen3_next.FAMILY.layers["E"],
    },
)


EXPERTS = {
    **{name: spec for name, spec in FAMILY.layers["E"].items() if ".experts." not in name},
    "mlp.experts.gate_up_proj": tables.FUSED_EXPERTS["gate_up_proj"],
    "mlp.experts.down_proj": tables.FUSED_EXPERTS["down_proj"],
}
SEEING = replace(
    qwen3_5.SEEING,
    model_type="qwen3_5_moe",
    read=qwen3_5.of_text(read),
    write=write,
    layers={**FAMILY.layers, "E": EXPERTS},
    written_as="qwen3_5_moe_text",
)
