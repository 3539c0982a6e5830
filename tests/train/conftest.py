# SPDX-License-Identifier: Apache-2.0
"""A run small enough for tests: a few files of words, a three-sublayer hybrid."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from hybridlm.config import (
    MLP,
    Attention,
    Config,
    DataConfig,
    Mamba2,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)  # fmt: skip
from hybridlm.config.overrides import override
from hybridlm.config.tree import to_dict
from hybridlm.optim.schedule import schedule_lengths
from hybridlm.sharding import make_mesh
from hybridlm.train import step as step_module
from hybridlm.train.ahead import TrainStep
from hybridlm.train.kept_step import of_config
from hybridlm.train.step import make_program

CONFIG = """
from hybridlm.config import *

def config():
    return Config(
        name="mini",
        model=ModelConfig(
            vocab_size=264, d_model=16, pattern="M*-", compute_dtype="float32",
            blocks={{"M": Mamba2(d_state=8, d_head=8, chunk=8), "*": Attention(n_heads=2, n_kv_heads=1, d_head=8),
                    "-": MLP(d_ff=32)}},
        ),
        data=DataConfig(
            path=("{folder}/train-*.txt",), val_path=("{folder}/val-*.txt",), cache_dir="{folder}/cache", seq_len=32,
            batch_size=8, prefetch=2,
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=2, schedule="constant"),
        run=RunConfig(
            steps=20, log_every=3, eval_every=10, eval_batches=2, save_every=5, keep=3, dir="{folder}/run",
            sample_tokens=4, sample_prompt="a", tensorboard=False, report=False,
        ),
    )
"""


def write_texts(folder: Path) -> None:
    """Files of words drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(1, 6))) for _ in range(40)]
    for name in [f"train-{i}" for i in range(20)] + ["val-0", "val-1"]:
        (folder / f"{name}.txt").write_text(" ".join(rng.choice(words, 120)))


@pytest.fixture
def mini(tmp_path):
    """Path of a config file whose data and run lie in the test's folder."""
    write_texts(tmp_path)
    file = tmp_path / "mini.py"
    file.write_text(CONFIG.format(folder=tmp_path))
    return file


@pytest.fixture
def one_device(monkeypatch):
    """`train` uses the first device alone, as on a machine that has one, and what was traced and compiled for the same
    program in a test before; the steps of a run are numbers that it takes."""
    monkeypatch.setattr("hybridlm.train.loop.make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    monkeypatch.setattr("hybridlm.train.loop.make_program", program_as_before)


PROGRAMS = {}
"""What a program hangs on -> it."""


def program_as_before(config: Config, mesh) -> step_module.Program:
    """`make_program`, whose jitted functions are those of the last run for which it was the same. Adapters' have a base
    of their own."""
    if config.lora.on:
        return step_module.make_program(config, mesh)
    made_of = step_module.make_objective, step_module.make_train_step, *map(type, config.model.blocks.values())
    key = str(of_config(config)), mesh, made_of  # what a test puts in their place makes another program
    if key not in PROGRAMS:
        PROGRAMS[key] = step_module.make_program(config, mesh)
    lengths = np.array(schedule_lengths(config.optim, config.run.steps), np.int32)
    anew = {name: TrainStep(getattr(PROGRAMS[key], name).jitted, lengths) for name in ("train_step", "inspect")}
    return PROGRAMS[key]._replace(**anew)


def small_config(*overrides: str) -> Config:
    """A config for steps on made-up batches; every size divides by 4."""
    config = Config(
        model=ModelConfig(
            vocab_size=64, d_model=32, pattern="M*-", compute_dtype="float32",
            blocks={
                "M": Mamba2(d_state=8, d_head=8, chunk=8),
                "*": Attention(n_heads=4, n_kv_heads=2, d_head=8, sinks=True, gate="elementwise", qk_norm=True),
                "-": MLP(d_ff=64),
            },
        ),
        data=DataConfig(seq_len=16, batch_size=8),
        optim=OptimConfig(lr=1e-2, warmup_steps=0, schedule="constant"),
        run=RunConfig(steps=100),
    )  # fmt: skip
    return override(config, overrides)


@cache
def small_program(overrides: tuple[str, ...] = (), mesh_sizes: tuple[int, ...] = (1, 1, 1)):
    """(config, mesh, program) of small_config on a mesh of data, fsdp, tensor, context; compiled once for all tests."""
    config = small_config(*overrides)
    mesh = make_mesh(MeshConfig(*mesh_sizes), jax.devices()[: int(np.prod(mesh_sizes))])
    return config, mesh, make_program(config, mesh)


STATES = {}
"""What a first state hangs on -> it, on the host."""


def first_state(config: Config, program: step_module.Program) -> dict:
    """`program.init()`, drawn by the first program of such a state on whatever mesh: to draw is a program by itself."""
    like = jax.tree.map(lambda x: (x.shape, x.dtype), program.state_like)
    key = str(to_dict(config.model)), config.run.seed, str(like)
    if key not in STATES:
        STATES[key] = jax.device_get(program.init())
    return jax.tree.map(lambda x, like: jax.device_put(np.array(x), like.sharding), STATES[key], program.state_like)


def make_batch(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Random packed rows: two documents each, right padding of random length."""
    rng = np.random.default_rng(seed)
    rows, tokens = config.data.batch_size, config.data.seq_len
    place = np.arange(tokens)[None]
    cut, end = rng.integers(1, tokens // 2, (rows, 1)), rng.integers(tokens // 2, tokens + 1, (rows, 1))
    segment_ids = np.where(place < cut, 1, np.where(place < end, 2, 0)).astype(np.int32)
    targets = rng.integers(0, config.model.vocab_size, (rows, tokens), dtype=np.int32)
    return {
        "tokens": rng.integers(0, config.model.vocab_size, (rows, tokens), dtype=np.int32) * (segment_ids > 0),
        "targets": np.where(segment_ids > 0, targets, -1).astype(np.int32),
        "segment_ids": segment_ids,
        "positions": np.where(segment_ids == 2, place - cut, np.where(segment_ids == 1, place, 0)).astype(np.int32),
    }
