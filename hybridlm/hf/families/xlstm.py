# SPDX-License-Identifier: Apache-2.0
"""xLSTM 7B: mLSTM and a gated MLP in every layer (Beck et al. 2025, arXiv:2503.13427)."""

from hybridlm.hf.families import common, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, MLSTM
from hybridlm.model.config import ModelConfig

RUNTIME = (
    "chunkwise_kernel", "sequence_kernel", "step_kernel", "mode", "chunk_size", "return_last_states",
    "autocast_kernel_dtype", "inference_state_dtype", "max_inference_chunksize", "norm_reduction_force_float32",
    "add_out_norm", "add_embedding_dropout", "add_forward_backend_padding", "add_post_blocks_norm", "cell_norm_eps",
    "force_bos_token_insert", "forward_backend_name", "head_dim", "igate_bias_init_range", "logits_soft_cap",
    "lm_head_weight_tying", "mlstm_round_up_to_multiple_of", "norm_type",
)  # fmt: skip
"""How the published implementation runs, and what it does not look at: the last norm is there whatever add_out_norm
says."""


def read(keys: Keys) -> ModelConfig:
    keys.carry(*RUNTIME)
    keys.only("weight_mode", "single")
    D, H = keys.some("hidden_size", None) or keys("embedding_dim", None) or 4096, keys("num_heads", 8)
    keys.values["hidden_size"] = D
    width = keys.some("embedding_dim", D)
    keys.require(width == D, f"embedding_dim ({width}) must be hidden_size ({D})")
    n_layers = keys.some("num_hidden_layers", None) or keys("num_blocks", None) or 32
    n_layers = keys.some("num_blocks", n_layers)  # of which there are so many, whatever the layers' number is
    d_key, d_head = (int(D * keys(f"{name}_dim_factor", factor)) for name, factor in (("qk", 0.5), ("v", 1.0)))
    for name, inner in (("qk_dim_factor", d_key), ("v_dim_factor", d_head)):
        keys.require(inner % H == 0, f"{name} * hidden_size ({inner}) not divisible by num_heads ({H})")
    bias, eps = keys("use_bias", False), keys("norm_eps", 1e-6)
    mlstm = MLSTM(
        H, d_key // H, d_head // H, gate_softcap=float(keys("gate_soft_cap", 15.0)), norm_eps=eps,
        eps=keys("eps", 1e-6), bias=bias,
    )  # fmt: skip
    multiple, factor = keys("ffn_round_up_to_multiple_of", 64), keys("ffn_proj_factor", 2.667)
    d_ff = int((D * factor + multiple - 1) // multiple * multiple)
    return ModelConfig(
        **common.widths(keys, "norm_eps", 1e-6, 50_304, False),
        norm_bias="sublayers" if bias else "none", logit_softcap=float(keys("output_logit_soft_cap", 30.0)),
        pattern="X-" * n_layers, blocks={"X": mlstm, "-": MLP(d_ff, bias=bias)},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    mlstm, mlp, D = common.block(config, MLSTM), common.block(config, MLP), config.d_model
    n_layers = len(config.pattern) // 2
    return {
        **common.write_widths(config, "norm_eps"),
        "embedding_dim": D, "num_heads": mlstm.n_heads, "num_hidden_layers": n_layers, "num_blocks": n_layers,
        "qk_dim_factor": mlstm.n_heads * mlstm.d_key / D, "v_dim_factor": mlstm.n_heads * mlstm.d_head / D,
        "gate_soft_cap": mlstm.gate_softcap or 15.0, "output_logit_soft_cap": config.logit_softcap or 30.0,
        "eps": mlstm.eps, "use_bias": mlstm.bias, "ffn_proj_factor": mlp.d_ff / D, "ffn_round_up_to_multiple_of": 1,
        "weight_mode": "single",
    }  # fmt: skip


MIXER = {
    **{f"{name}.{part}": spec for i, name in enumerate("qk")
       for part, spec in (("weight", f"mixer.w_qk: (H N) D -> D {i} H N"), ("bias", f"mixer.b_qk: (H N) -> {i} H N"))},
    **{f"{name}.{part}": spec for i, name in enumerate(("v", "ogate_preact"))
       for part, spec in (("weight", f"mixer.w_vo: (H P) D -> D {i} H P"), ("bias", f"mixer.b_vo: (H P) -> {i} H P"))},
    **{f"{name}gate_preact.{part}": spec for i, name in enumerate("if")
       for part, spec in (("weight", f"mixer.w_gates: H D -> D {i} H"), ("bias", f"mixer.b_gates: H -> {i} H"))},
    "multihead_norm.weight": "mixer.norm: (H P) -> H P",
    "multihead_norm.bias": "mixer.norm_bias: (H P) -> H P",
    "out_proj.weight": "mixer.w_out: D (H P) -> H P D",
    "out_proj.bias": "mixer.b_out: D",
}  # fmt: skip
GATED_MLP = tables.named(tables.GATED_MLP, gate_proj="proj_up_gate", up_proj="proj_up", down_proj="proj_down")
FAMILY = Family(
    model_type="xlstm",
    architecture="xLSTMForCausalLM",
    ties=False,
    read=read,
    write=write,
    per_layer=2,
    top=tables.top("backbone.embeddings", "backbone.out_norm"),
    layer="backbone.blocks.{layer}.",
    layers={
        "X": {**tables.norm("norm_mlstm"), **tables.at("mlstm_layer.", MIXER)},
        "-": {**tables.norm("norm_ffn"), **tables.at("ffn.", GATED_MLP)},
    },
)
