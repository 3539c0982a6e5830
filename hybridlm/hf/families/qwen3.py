# SPDX-License-Identifier: Apache-2.0
"""Qwen3: Qwen2 with a norm of each query and key head, and biases everywhere or nowhere."""

from dataclasses import replace

from hybridlm.hf.families import common, qwen2, rope
from hybridlm.hf.keys import Keys
from hybridlm.layers import Attention
from hybridlm.model.config import ModelConfig


def read(keys: Keys) -> ModelConfig:
    bias = keys("attention_bias", False)
    attention = Attention(
        **common.heads(keys, n_kv_heads=32, d_head=128), rope=rope.read(keys, 32768), qk_norm=True,
        qk_norm_eps=keys("rms_norm_eps", 1e-6), qkv_bias=bias, out_bias=bias,
    )  # fmt: skip
    return qwen2.read_layers(keys, attention)


def write(config: ModelConfig) -> dict:
    return {**qwen2.write(config), "attention_bias": common.block(config, Attention, window=None).qkv_bias}


FAMILY = replace(qwen2.FAMILY, model_type="qwen3", architecture="Qwen3ForCausalLM", read=read, write=write)
