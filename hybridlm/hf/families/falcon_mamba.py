# SPDX-License-Identifier: Apache-2.0
"""Falcon-Mamba: Mamba with RMS norms of dt, B and C that have no weights (Zuo et al. 2024)."""

from dataclasses import replace

from hybridlm.errors import require
from hybridlm.hf.families import common, mamba
from hybridlm.hf.keys import Keys
from hybridlm.layers import InnerNorm, Mamba1
from hybridlm.model.config import ModelConfig


def read(keys: Keys) -> ModelConfig:
    keys.carry("use_falcon_mambapy")
    return mamba.read(keys, InnerNorm(learned=False, eps=keys("mixer_rms_eps", 1e-6)))


def write(config: ModelConfig) -> dict:
    norm = common.block(config, Mamba1).inner_norm
    require(norm is not None, "blocks: Mamba1 without inner_norm, where the family has one")
    return {**mamba.write(config), "mixer_rms_eps": norm.eps}


FAMILY = replace(mamba.FAMILY, model_type="falcon_mamba", architecture="FalconMambaForCausalLM", read=read, write=write)
