# SPDX-License-Identifier: Apache-2.0
"""Hunyuan dense: Llama with queries and keys normed behind the rotation, whose base may be stretched (Tencent 2025)."""

from dataclasses import replace

from hybridlm.hf.families import common, llama, rope, tables
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention
from hybridlm.model.config import ModelConfig

UNREAD = (
    "add_classification_head", "attention_head_dim", "class_num", "dense_list", "eod_token_id", "enable_lm_head_fp32",
    "im_end_id", "im_newline_id", "im_start_id", "mask_init_id", "max_seqlen", "norm_type", "num_media_embeds",
    "org_vocab_size", "pool_type", "position_embedding_xdrope", "pretraining_tp", "text_end_id", "text_start_id",
    "use_rotary_pos_emb", "anyres_pooling_size", "anyres_vit_max_image_size", "anyres_vit_two_views", "skip_cls_token",
    "image_token_id", "video_start_id", "video_end_id", "vit_path", "vit_type", "moe_layer_num_skipped",
)  # fmt: skip
"""Keys of published files that the published implementation does not look at."""


def read(keys: Keys) -> ModelConfig:
    keys.carry(*UNREAD)
    keys.only("use_qk_norm", True)
    for name in ("use_cla", "use_mla", "mlp_bias"):
        keys.only(name, False, None)
    bias = keys("attention_bias", False)
    attention = Attention(
        **common.heads(keys), rope=rope.read(keys, 2048, ntk=True), qk_norm=True, qk_norm_rotated=True,
        qk_norm_eps=keys("rms_norm_eps", 1e-5), qkv_bias=bias, out_bias=bias,
    )  # fmt: skip
    mlp = MLP(keys("intermediate_size", 11008), keys.choose("hidden_act", common.GATED, "silu"))
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-5, 290943, False),
        pattern="*-" * keys("num_hidden_layers", 32), blocks={"*": attention, "-": mlp},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    values = llama.write(config)
    del values["mlp_bias"]
    return values


HEADS = tables.named(tables.ATTENTION, q_norm="query_layernorm", k_norm="key_layernorm")
FAMILY = replace(
    llama.FAMILY, model_type="hunyuan_v1_dense", architecture="HunYuanDenseV1ForCausalLM", read=read, write=write,
    layers={**llama.FAMILY.layers, "*": {"input_layernorm.weight": "norm.weight: D", **tables.at("self_attn.", HEADS)}},
)  # fmt: skip
