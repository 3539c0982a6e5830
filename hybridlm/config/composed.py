# SPDX-License-Identifier: Apache-2.0
"""Compositions of papers as runs: a tiny one that learns bytes in minutes, and sizes as published."""

import dataclasses

from hybridlm.config import Config, DataConfig, OptimConfig, RunConfig, Wsd
from hybridlm.config.published import recipe
from hybridlm.model.config import ModelConfig

TINY = {"vocab_size": 320, "d_model": 64, "tie_embeddings": True, "compute_dtype": "float32"}
"""ModelConfig's fields of all tiny sizes: bytes, and no tokenizer to be trained."""


def composed(name: str, size: str, model: ModelConfig) -> Config:
    """A run called `name_size` of a model: `tiny` reads the embedded corpus on two CPU cores, any other size has the
    recipe of published sizes."""
    if size != "tiny":
        return recipe(name, size, dataclasses.replace(model, remat="full"))
    return Config(
        name=f"{name}_{size}",
        model=model,
        data=DataConfig(seq_len=128, batch_size=8),
        optim=OptimConfig(lr=3e-3, schedule=Wsd(final_lr_ratio=0.02), warmup_steps=10),
        run=RunConfig(
            steps=300, eval_every=150, eval_batches=16, save_every=150, sample_prompt="def ", sample_tokens=200
        ),
    )
