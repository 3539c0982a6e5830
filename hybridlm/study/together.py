# SPDX-License-Identifier: Apache-2.0
"""Models that differ in their seed and their rate alone, trained by one program: a device that one of them leaves idle
takes the steps of many in hardly more time, and the program is compiled once."""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from hybridlm.config import Config
from hybridlm.study.on_task import Trained, Trial, check, one_device, rows_of
from hybridlm.train.metrics import Metrics, merge
from hybridlm.train.step import Program, make_program
from hybridlm.train.xla import options
from pallas_kernels.platform import platform_of


class Together(NamedTuple):
    """Models behind their last step; the first axis of arrays is theirs."""

    graphdef: nnx.GraphDef
    """Of each."""
    state: dict
    """The train states."""
    losses: list[list[tuple[int, float]]]
    """Of each (step, mean loss of the steps since the one before), nats an answer."""
    skipped: list[int]
    """Of each the steps in a row, at its end, whose loss or gradient was not finite."""
    seconds: float
    """Of the steps of all, compiling them included."""

    def of(self, i: int) -> Trained:
        """A model of them."""
        state = jax.tree.map(lambda leaf: leaf[i], self.state)
        return Trained(nnx.merge(self.graphdef, state["params"]), state, self.losses[i], self.seconds)


def train_together(
    config: Config,
    seeds: Sequence[int],
    rates: Sequence[float],
    trials: Sequence[Trial],
    say: Callable[[str], None] = lambda line: None,
) -> Together:
    """Trains a model of each (seed, rate), as `on_task.train_on` trains one whose run.seed is the seed and whose
    learning rates are `rate` times those of the config; equal to that beyond rounding.

    One that is not finite any more leaves the others alone: see `Together.skipped`. Raises ConfigError as
    `on_task.check`.
    """
    check(config, trials)
    mesh, data, run = one_device(), config.data, config.run
    with jax.set_mesh(mesh):
        program = make_program(config, mesh)
        rate_S = None if all(rate == 1 for rate in rates) else np.array(rates, np.float32)
        state = jax.jit(jax.vmap(program.fresh))(np.array(seeds, np.int32))
        step = make_step(program, rate_S)
        drawn = {
            seed: rows_of(trials, seed + 1, data.batch_size, data.seq_len, run.steps) for seed in dict.fromkeys(seeds)
        }
        return _take_steps(config, program, step, state, _stacked(drawn, seeds), say)


def make_step(program: Program, rate_S: np.ndarray | None) -> Callable:
    """(states, batches) -> (states, metrics), of models stacked in front; the states given are donated.

    rate_S: what the change of the parameters, which is in proportion to the learning rates, is multiplied by.
    """
    lengths, of_one = program.train_step.lengths, inspect.unwrap(program.train_step.jitted)
    often = options(platform_of(program.batch_sharding.mesh.devices.flat[0]))  # those of a jit within would be refused

    def one(state, batch, rate):
        after, metrics = of_one(state, batch, lengths)
        if rate is not None:
            scaled = jax.tree.map(lambda old, new: old + rate * (new - old), state["params"], after["params"])
            after = after | {"params": scaled}
        return after, metrics

    axes = (0, 0, None if rate_S is None else 0)
    jitted = jax.jit(jax.vmap(one, in_axes=axes), donate_argnums=0, compiler_options=often)
    return lambda state, batch: jitted(state, batch, rate_S)


def _stacked(drawn: dict[int, Iterator], seeds: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
    for batches in zip(*drawn.values()):
        of = dict(zip(drawn, batches))
        yield {name: np.stack([of[seed][name] for seed in seeds]) for name in batches[0]}


def _take_steps(config: Config, program: Program, step: Callable, state: dict, batches: Iterator, say) -> Together:
    began, run = time.monotonic(), config.run
    n_models = state["step"].shape[0]
    losses: list[list[tuple[int, float]]] = [[] for _ in range(n_models)]
    since: Metrics = {}
    skipped = [0] * n_models
    for at, batch in enumerate(batches, 1):
        state, metrics = step(state, batch)
        since = merge(since, metrics)
        if at % run.log_every == 0 or at == run.steps:
            numbers, since = jax.device_get(since), {}
            for i in range(n_models):
                of = jax.tree.map(lambda value, i=i: value[i].item(), numbers)
                losses[i].append((at, float(of["loss"].value())))
                skipped[i] = int(of["skipped_in_row"].value())
            told = " ".join(f"{of[-1][1]:.3f}" for of in losses)
            say(f"step {at}/{run.steps}  loss {told}  {time.monotonic() - began:.0f} s")
    jax.block_until_ready(state)
    return Together(program.graphdef, state, losses, skipped, time.monotonic() - began)
