# SPDX-License-Identifier: Apache-2.0
"""What is jitted: one optimizer step and one evaluation batch, the same program on one device and on many.

The train state is a dict: `params` (nested dict of float32 arrays), `opt_state`, `step` (steps taken), `skipped` (of
them not applied), `skipped_in_row`, and `key` (random state, as raw bits). Batches are dicts of int32 [B, T].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybridlm.config import Config
from hybridlm.model.statistics import statistics, summarise
from hybridlm.optim.optimizer import make_optimizer
from hybridlm.train.loss import LossSums, cross_entropy


class Program(NamedTuple):
    """The jitted functions of a run and how their arguments lie on the mesh."""

    init: Callable
    """() -> train state, made sharded; nothing larger than a shard exists on any device."""
    init_from: Callable
    """(params) -> train state with those parameters, which are donated."""
    train_step: Callable
    """(state, batch) -> (state, metrics); the state given is donated. Metrics are float32 scalars on device."""
    eval_step: Callable
    """(params, batch) -> LossSums."""
    state_like: dict
    """Shapes, types and shardings of the train state."""
    batch_sharding: NamedSharding
    """Rows over `data` and `fsdp`."""
    graphdef: nnx.GraphDef
    """The model without its parameters: nnx.merge(graphdef, state["params"])."""


def make_program(config: Config, mesh: Mesh) -> Program:
    """Everything a run computes, for a mesh that is (or will be) set by jax.set_mesh. Raises ConfigError."""
    from hybridlm.model.init import abstract
    from hybridlm.model.model import HybridLM
    from hybridlm.sharding import batch_sharding, param_shardings

    def build(key):
        return HybridLM(config.model, rngs=nnx.Rngs(key))

    graphdef, _, info = abstract(config.model)
    optimizer, schedule = make_optimizer(config.optim, config.run.steps, info)

    def keys():
        return jax.random.split(jax.random.key(config.run.seed))  # of the parameters, of the run

    def init():
        return init_from(nnx.to_pure_dict(nnx.split(build(keys()[0]), nnx.Param)[1]))

    def init_from(params):
        zero = jnp.zeros((), jnp.int32)
        return {
            "params": params, "opt_state": optimizer.init(params), "step": zero, "skipped": zero,
            "skipped_in_row": zero, "key": jax.random.key_data(keys()[1]),
        }  # fmt: skip

    shapes = jax.eval_shape(init)
    everywhere = NamedSharding(mesh, PartitionSpec())
    params_at = param_shardings(info, mesh)
    shardings = jax.tree.map(lambda _: everywhere, shapes) | {
        "params": params_at,
        "opt_state": like_params(shapes["opt_state"], shapes["params"], params_at, everywhere),
    }
    like = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)
    loss_sums = make_loss(config, graphdef)
    step = make_train_step(config, loss_sums, optimizer, schedule, params_at)
    # Run once: on CPU, LLVM's optimisation of the random numbers would take longer than all of them.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    quick = {"xla_backend_optimization_level": 0} if on_cpu else None
    return Program(
        init=jax.jit(init, out_shardings=shardings, compiler_options=quick),
        init_from=jax.jit(init_from, out_shardings=shardings, compiler_options=quick, donate_argnums=0),
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
        eval_step=jax.jit(loss_sums),
        state_like=like,
        batch_sharding=batch_sharding(mesh),
        graphdef=graphdef,
    )


def like_params(opt_state, params, values, default):
    """Tree like the optimizer's state: where a leaf belongs to a parameter (its path ends in the parameter's, and its
    shape is the same), that parameter's leaf of `values`, elsewhere `default`."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    by_path = {path: (p.shape, value) for (path, p), value in zip(paths, jax.tree.leaves(values), strict=True)}

    def choose(path, leaf):
        for start in range(len(path)):
            shape, value = by_path.get(path[start:], (None, None))
            if shape == leaf.shape:
                return value
        return default

    return jax.tree_util.tree_map_with_path(choose, opt_state)


def make_loss(config: Config, graphdef: nnx.GraphDef) -> Callable:
    """(params, batch) -> LossSums."""
    kinds = statistics(config.model)

    def loss_sums(params, batch) -> LossSums:
        model = nnx.merge(graphdef, params)
        x_BTD, stats = model.hidden_with_stats(batch["tokens"], batch["segment_ids"], batch["positions"])
        sums = cross_entropy(
            x_BTD, model.unembedding(), batch["targets"], multiplier=model.logit_scale,
            softcap=config.model.logit_softcap,
        )  # fmt: skip
        merged = summarise(config.model, stats)
        router = {name: v if kinds[name].batches == "sum" else v * sums.tokens for name, v in merged.items()}
        return sums._replace(router=router or None)

    return loss_sums


def make_train_step(config: Config, loss_sums, optimizer, schedule, params_at=None) -> Callable:
    """(state, batch) -> (state, metrics): the gradient of the mean over all tokens of the batch, applied if finite.

    With optim.accumulate > 1 the gradients of that many microbatches are summed in float32 one after the other; the
    result is that of the whole batch, but for the load-balance loss of experts, which is taken of each microbatch.
    Where the loss or the gradient is not finite, parameters and optimizer stay as they were and the step counts as
    skipped.
    """
    n_micro, kinds = config.optim.accumulate, statistics(config.model)

    def gradients(params, batch):
        """LossSums of the batch, and the gradient of its mean loss."""
        n_tokens = jnp.maximum(jnp.sum(batch["targets"] >= 0), 1).astype(jnp.float32)

        def mean_loss(params, micro):
            sums = loss_sums(params, micro)
            of_blocks = sum(value for name, value in (sums.router or {}).items() if kinds[name].loss)
            return (sums.nats + config.optim.z_loss * sums.z + of_blocks) / n_tokens, sums

        gradient = jax.grad(mean_loss, has_aux=True)
        if n_micro == 1:
            grads, sums = gradient(params, batch)
            return sums, _as_params(grads, params_at)

        def add(total, micro):
            grads, sums = gradient(params, micro)
            return jax.tree.map(jnp.add, total, (_as_params(grads, params_at), sums)), None

        micros = {k: _microbatches(v, n_micro) for k, v in batch.items()}
        zeros = jax.tree.map(jnp.zeros_like, params)
        no_sums = jax.eval_shape(loss_sums, params, jax.tree.map(lambda x: x[0], micros))
        start = (_as_params(zeros, params_at), jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), no_sums))
        (grads, sums), _ = lax.scan(add, start, micros)
        return sums, grads

    def train_step(state, batch):
        sums, grads = gradients(state["params"], batch)
        grad_norm = optax.tree.norm(grads)
        ok = jnp.isfinite(grad_norm) & jnp.isfinite(sums.nats) & jnp.isfinite(sums.z)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        kept = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old), (params, opt_state), (state["params"], state["opt_state"])
        )
        missed = 1 - ok.astype(jnp.int32)
        new_state = {
            "params": kept[0], "opt_state": kept[1], "step": state["step"] + 1, "skipped": state["skipped"] + missed,
            "skipped_in_row": (state["skipped_in_row"] + 1) * missed, "key": state["key"],
        }  # fmt: skip
        metrics = {
            "nats": sums.nats, "z": sums.z, "tokens": sums.tokens, "grad_norm": grad_norm,
            "lr": jnp.float32(schedule(state["step"] - state["skipped"])),
            "skipped": new_state["skipped"], "skipped_in_row": new_state["skipped_in_row"],
        }  # fmt: skip
        return new_state, metrics | (sums.router or {})

    return train_step


def _microbatches(x_BT, n_micro: int):
    """[n_micro, B / n_micro, T]: every n_micro-th row, so that each device splits the rows that it has."""
    return x_BT.reshape(x_BT.shape[0] // n_micro, n_micro, *x_BT.shape[1:]).swapaxes(0, 1)


def _as_params(grads, params_at):
    """Gradients laid out like their parameters."""
    return grads if params_at is None else lax.with_sharding_constraint(grads, params_at)
