# SPDX-License-Identifier: Apache-2.0
"""A run of a few seconds for the examples: one attention sublayer on files of words, which compiles fast."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax

from hybridlm.config import Attention, Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from hybridlm.sharding import make_mesh
from hybridlm.train.loop import train
from tests.train.conftest import write_texts


def small_run(folder: Path, **parts) -> Config:
    """Six steps in `folder`/run; parts: sub-configs in the place of its own."""
    if not (folder / "train-0.txt").exists():
        write_texts(folder)
    blocks = {"*": Attention(n_heads=2, d_head=8)}
    config = Config(
        name="small",
        model=ModelConfig(vocab_size=264, d_model=16, pattern="*", blocks=blocks, compute_dtype="float32"),
        data=DataConfig(
            path=(f"{folder}/train-*.txt",), val_path=(f"{folder}/val-*.txt",), cache_dir=f"{folder}/cache",
            seq_len=32, batch_size=8,
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        run=RunConfig(steps=6, log_every=1, eval_every=-1, save_every=0, dir=f"{folder}/run", tensorboard=False),
    )  # fmt: skip
    return replace(config, **parts)


def records(config: Config, n_devices: int = 1, **more) -> list[dict]:
    """Trains the config to its last step on the first devices, and reads the training records of its run. more: what
    `train` takes."""
    first = mock.patch("hybridlm.train.loop.make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:n_devices]))
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing), first:
        assert train(config, **more) == 0
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == "train"]


def losses(config: Config) -> list[float]:
    """The training loss of each step."""
    return [record["loss"] for record in records(config)]


def resumed_losses(config: Config, stop: int) -> list[float]:
    """The same of a run that ends after `stop` steps of a run of all, and is resumed in a folder of its own."""
    run = replace(config.run, dir=f"{config.run.dir}-resumed")
    records(replace(config, run=replace(run, steps=stop)))
    return losses(replace(config, run=run))
