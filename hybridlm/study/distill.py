# SPDX-License-Identifier: Apache-2.0
"""A model trained to give another's logits (Hinton et al. 2015, "Distilling the knowledge in a neural network", here
between models of the same weights, one of which has less attention).

Axis letters: B rows, T tokens, D model, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from hybridlm.config import Config
from hybridlm.errors import require
from hybridlm.model.init import abstract
from hybridlm.model.model import HybridLM
from hybridlm.optim.optimizer import make_optimizer
from hybridlm.optim.schedule import schedule_lengths
from hybridlm.train.ahead import TrainStep
from hybridlm.train.base import Base
from hybridlm.train.metrics import Mean
from hybridlm.train.step import Program, make_program, make_train_step

LOGITS = 2**22
"""Logits of each model that are in memory at once, about."""


def divergence(teacher: HybridLM, student: HybridLM, x_BTD, y_BTD, places_BT, n_logits: int = LOGITS) -> jax.Array:
    """Sum over places of KL(teacher || student), nats, from the hidden vectors x of the one and y of the other; the
    teacher's have no gradient. places: bool, where logits are compared."""
    B, T, _ = x_BTD.shape
    n_chunks = -(-T // max(1, n_logits // (B * teacher.config.vocab_size)))
    size = -(-T // n_chunks)

    def cut(a):
        a = jnp.pad(a, ((0, 0), (0, n_chunks * size - T), *[(0, 0)] * (a.ndim - 2)))
        return a.reshape(B, n_chunks, size, *a.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def part(x, y, at):
        p, q = (jax.nn.log_softmax(model.logits(a)) for model, a in ((teacher, x), (student, y)))
        return jnp.sum(jnp.where(at, jnp.sum(jnp.exp(p) * (p - q), axis=-1), 0.0))

    def add(total, chunk):
        return total + part(*chunk), None

    return lax.scan(add, jnp.float32(0.0), (cut(lax.stop_gradient(x_BTD)), cut(y_BTD), cut(places_BT)))[0]


def check_distilled(config: Config) -> None:
    """ConfigError for what a distillation does not do: microbatches, adapters, rounded matrices."""
    n_micro = config.optim.accumulate
    require(n_micro == 1, f"optim.accumulate ({n_micro}) must be 1 in a distillation: lower data.batch_size")
    require(not config.lora.on, f"lora.rank ({config.lora.rank}) must be 0 in a distillation")
    rounded = config.quantize.weights
    require(
        not rounded, f"quantize.weights ({rounded}) must be none in a distillation: the weights are trained as they are"
    )


def make_distillation(config: Config, mesh: Mesh, teacher: HybridLM) -> Program:
    """The program of a student's config whose step brings its logits to the teacher's, at the places of a batch that
    have a target. Its metric `loss` is their divergence, nats a place.

    ConfigError where the vocabularies differ, and as of `check_distilled`.
    """
    theirs, ours = teacher.config.vocab_size, config.model.vocab_size
    require(theirs == ours, f"model.vocab_size ({ours}) must be the teacher's ({theirs})")
    check_distilled(config)
    program = make_program(config, mesh)
    graphdef, params = nnx.split(teacher, nnx.Param)
    whole = nnx.to_pure_dict(params)
    base = Base(whole)
    base.params = whole

    def gradients(student, batch, whole):
        where = batch["tokens"], batch["segment_ids"], batch["positions"]
        places_BT = batch["targets"] >= 0
        n = jnp.maximum(jnp.sum(places_BT), 1).astype(jnp.float32)
        master = nnx.merge(graphdef, whole)
        x_BTD = lax.stop_gradient(master.hidden(*where))

        def loss(student):
            model = nnx.merge(program.graphdef, program.whole(student))
            return divergence(master, model, x_BTD, model.hidden(*where), places_BT) / n

        mean, grads = jax.value_and_grad(loss)(student)
        return mean, {"loss": Mean(mean * n, n)}, grads

    steps, info = config.run.steps, abstract(config.model).info
    step = make_train_step(gradients, partial(make_optimizer, config.optim, steps, info), _as_it_is)
    shardings = jax.tree.map(lambda x: x.sharding, program.state_like)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    lengths = np.array(schedule_lengths(config.optim, steps), np.int32)
    return program._replace(train_step=TrainStep(jitted, lengths, base))


def _as_it_is(batch: dict, key: Callable) -> dict:
    return batch
