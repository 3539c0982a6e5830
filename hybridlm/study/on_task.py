# SPDX-License-Identifier: Apache-2.0
"""Models trained on a probe's task itself: the step and the optimizer of every run, rows of the task for text."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hybridlm import storage
from hybridlm.config import Config, MeshConfig
from hybridlm.config.mesh import check_config
from hybridlm.config.stored import save_config
from hybridlm.config.tree import to_dict
from hybridlm.data import load_tokenizer
from hybridlm.errors import RunError, require
from hybridlm.model.model import HybridLM
from hybridlm.probes import UNSCORED, Task
from hybridlm.probes.scoring import check_vocabulary
from hybridlm.sharding import make_mesh
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.metrics import Metrics, merge, on_host
from hybridlm.train.step import Program, make_program
from hybridlm.train.tokenizer_copy import IDENTITY, keep_tokenizer


@dataclass(frozen=True)
class Trained:
    """A model behind its last step."""

    model: HybridLM
    state: dict
    """The train state."""
    losses: list[tuple[int, float]]
    """(step, mean loss of the steps since the one before), nats an answer."""
    seconds: float
    """Of the steps, compiling them included."""


def one_device() -> jax.sharding.Mesh:
    """The mesh of models that are small: the first device of this process."""
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


class Trial(NamedTuple):
    """A task at a length."""

    task: Task
    length: int
    """Tokens of a document of it."""


def rows_of(trials: Sequence[Trial], seed: int, rows: int, length: int, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches as a train step takes them, int32 [rows, length], one for each of the steps.

    Each trial has an equal share of the steps, in their order. A row holds as many documents of its length as fit, one
    behind the other, and padding; targets are the answers alone. A batch is a function of the trial, seed and step.
    """
    for step in range(steps):
        trial = trials[step * len(trials) // steps]
        n = length // trial.length
        examples = trial.task.batch(seed, step, rows * n, trial.length)
        ids = np.repeat(np.arange(1, n + 1), trial.length)
        fields = {
            "tokens": (examples.tokens_BT, 0), "targets": (examples.targets_BT, UNSCORED),
            "segment_ids": (np.broadcast_to(ids, (rows, len(ids))), 0),
            "positions": (np.broadcast_to(np.arange(trial.length), (rows * n, trial.length)), 0),
        }  # fmt: skip
        yield {
            name: np.pad(value.reshape(rows, -1), ((0, 0), (0, length - len(ids))), constant_values=filler).astype(
                np.int32
            )
            for name, (value, filler) in fields.items()
        }


def check(config: Config, trials: Sequence[Trial]) -> None:
    """ConfigError, one line, where the model cannot be trained on the trials or on one device."""
    ahead = config.model.sees_ahead
    require(not ahead, f"a model that sees ahead reads the answers: {ahead}")
    prefix = config.model.prefix_tokens
    require(not prefix, f"model.prefix_tokens ({prefix}) must be 0: rows of a task have no room for them")
    for task, length in trials:
        task.check(length)
        check_vocabulary(config.model.vocab_size, task)
        row = config.data.seq_len
        require(length <= row, f"length ({length}) of a document must be at most data.seq_len ({row})")
    check_config(config, one_device())


def train_on(config: Config, trials: Sequence[Trial], say: Callable[[str], None] = lambda line: None) -> Trained:
    """Trains the config's model on tasks, in their order, for run.steps steps of data.batch_size rows of data.seq_len
    tokens.

    Parameters follow from run.seed and rows from run.seed + 1, whatever the device. Raises ConfigError as `check`, and
    RunError where optim.max_skipped steps in a row are not finite.
    """
    check(config, trials)
    mesh, data, run = one_device(), config.data, config.run
    with jax.set_mesh(mesh):
        program = make_program(config, mesh)
        batches = rows_of(trials, run.seed + 1, data.batch_size, data.seq_len, run.steps)
        return take_steps(config, program, program.init(), batches, say)


def take_steps(
    config: Config, program: Program, state: dict, batches: Iterator[dict[str, Any]], say: Callable[[str], None]
) -> Trained:
    """run.steps steps from a train state on, which is donated."""
    began, losses = time.monotonic(), []
    since: Metrics = {}
    for step, batch in zip(range(1, config.run.steps + 1), batches):
        placed = {name: jax.device_put(value, program.batch_sharding) for name, value in batch.items()}
        state, metrics = program.train_step(state, placed)
        since = merge(since, metrics)
        if step % config.run.log_every == 0 or step == config.run.steps:
            numbers, since = on_host(since), {}
            skipped = int(numbers["skipped_in_row"].value())
            most = config.optim.max_skipped
            if skipped >= most:
                raise RunError(f"step {step}: loss or gradient of {skipped} steps in a row not finite: lower optim.lr")
            losses.append((step, float(numbers["loss"].value())))
            say(f"step {step}/{config.run.steps}  loss {losses[-1][1]:.4f}  {time.monotonic() - began:.0f} s")
    jax.block_until_ready(state)
    return Trained(program.model(state["params"]), state, losses, time.monotonic() - began)


def keep(folder: Path, config: Config, trained: Trained, tokenizer: str | None = None) -> None:
    """Writes the folder of a run with its last checkpoint, which every command that takes a run reads.

    tokenizer: the fingerprint of the config's; None: it is built in.
    """
    steps, rows = config.run.steps, config.data.batch_size * config.data.seq_len
    config = replace(config, run=replace(config.run, dir=str(folder)))
    storage.make_folder(folder)
    save_config(config, folder / "config.json")
    records = [{"kind": "train", "step": step, "loss": loss, "tokens": step * rows} for step, loss in trained.losses]
    end = {"kind": "end", "step": steps, "seconds": round(trained.seconds, 1)}
    storage.write_text(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in [*records, end]))
    identity = tokenizer or load_tokenizer(config.data.tokenizer, bos=None, eos=None).fingerprint
    keep_tokenizer(config.data, folder)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    try:
        checkpoints.supersede(after=-1)
        checkpoints.save(steps, {"params": trained.state["params"]}, to_dict(config), {IDENTITY: identity})
    finally:
        checkpoints.close()
