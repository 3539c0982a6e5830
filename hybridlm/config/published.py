# SPDX-License-Identifier: Apache-2.0
"""Published sizes as runs that pretrain them: what configs/ says of a size is what its config.json says."""

import dataclasses
from typing import Any

from hybridlm.config import Config, DataConfig, MeshConfig, OptimConfig, RunConfig
from hybridlm.hf.config_json import read_values
from hybridlm.hf.families import family_of
from hybridlm.model.config import ModelConfig
from hybridlm.optim import Wsd


def published(name: str, size: str, values: dict[str, Any]) -> Config:
    """A run called `name_size` of the model that a config.json describes, read as `from_hf` reads it.

    values: the config.json's, those that are its class's defaults left out at will.
    """
    model = read_values(family_of(values["model_type"]), values, f"{name}:{size}")
    return recipe(name, size, dataclasses.replace(model, remat="full"))


def recipe(name: str, size: str, model: ModelConfig) -> Config:
    """A run called `name_size` of a model, by a recipe that is ours, not the publisher's: AdamW at 3e-4 with warmup and
    decay, 4 million tokens a step, parameters and optimizer sharded over all devices."""
    return Config(
        name=f"{name}_{size}",
        model=model,
        data=DataConfig(seq_len=4096, batch_size=1024),
        optim=OptimConfig(lr=3e-4, schedule=Wsd(final_lr_ratio=0.01), warmup_steps=1000),
        mesh=MeshConfig(data=1, fsdp=-1),
        run=RunConfig(steps=100_000, eval_every=2000, eval_batches=32, save_every=1000, sample_tokens=256),
    )
