# SPDX-License-Identifier: Apache-2.0
"""What is jitted: one optimizer step and one evaluation batch, the same program on one device and on many.

The train state is a dict: `params` (nested dict of float32 arrays), `opt_state`, `step` (steps taken), `skipped` (of
them not applied), `skipped_in_row`, and `key` (random state, as raw bits). Batches are dicts of int32 [B, T].
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybridlm.config import Config, DataConfig
from hybridlm.data.packing import FIELDS
from hybridlm.model import lora, quantize
from hybridlm.model.init import abstract
from hybridlm.model.model import HybridLM
from hybridlm.model.statistics import statistics
from hybridlm.optim.optimizer import make_optimizer
from hybridlm.optim.rules import is_bounded
from hybridlm.optim.schedule import schedule_lengths
from hybridlm.sharding import axis_size, batch_sharding, param_shardings, per_slice, whole_weights
from hybridlm.train import tables
from hybridlm.train.ahead import TrainStep
from hybridlm.train.base import Base, WithBase, like_on
from hybridlm.train.inspection import make_inspect
from hybridlm.train.layout import SUMS, Layout, make_layout, unrolled
from hybridlm.train.metrics import Last, Metrics, empty, merge
from hybridlm.train.objective import make_objective
from hybridlm.train.shares import share_shardings, splits_state
from hybridlm.train.xla import options, options_on
from pallas_kernels.platform import platform_of

HOST = "pinned_host"
"""Kind of the memory of a host that devices read by themselves."""
UNROLLED = 8
"""Microbatches whose metrics are merged without a loop."""
ADAPTERS = 1
"""What the key of the parameters is folded with for that of adapters."""


class Program(NamedTuple):
    """The jitted functions of a run and how their arguments lie on the mesh."""

    init: Callable
    """() -> train state, made sharded; nothing larger than a shard exists on any device."""
    init_from: Callable
    """(params) -> train state with those parameters, which are donated; in a run with adapters they are its base."""
    train_step: Callable
    """(state, batch) -> (state, metrics); the state given is donated. Metrics (`train.metrics`) are on device."""
    eval_step: Callable
    """(params, batch) -> metrics."""
    inspect: Callable
    """(state, batch) -> numbers of the step that would be taken, by kind of block: see `train.inspection`."""
    state_like: dict
    """Shapes, types and shardings of the train state."""
    batch_sharding: NamedSharding
    """Rows over `data` and `fsdp`."""
    graphdef: nnx.GraphDef
    """The model without its parameters: `model` gives it with them."""
    base: Base
    """What the programs take beside the state; a run with adapters fills it before its first step."""
    fresh: Callable
    """(seed) -> train state of that seed, as `init` makes it of the config's; a function to be transformed, not
    jitted."""
    whole: Callable
    """(params, *base.args) -> the model's parameters: those of the state, or the base with the adapters in it; on each
    device all of what replicas share."""
    puts_together: bool
    """Whether those are not the state's as they are."""

    def model(self, params: dict) -> HybridLM:
        """The model with a state's parameters."""
        return nnx.merge(self.graphdef, jax.jit(self.whole)(params, *self.base.args) if self.puts_together else params)

    def batch_like(self, data: DataConfig) -> dict:
        """Shapes, types and shardings of a batch."""
        shape = data.batch_size, data.seq_len
        return {name: jax.ShapeDtypeStruct(shape, np.int32, sharding=self.batch_sharding) for name in FIELDS}


def make_program(config: Config, mesh: Mesh) -> Program:
    """Everything a run computes, for a mesh that is (or will be) set by jax.set_mesh. Raises ConfigError."""
    quantize.check_trained(config.model, config.quantize)
    graphdef, _, info = abstract(config.model)
    steps, split = config.run.steps, splits_state(config, mesh)
    specs = lora.adapters(config.model, config.lora) if config.lora.on else {}
    trained = lora.nested(specs) if specs else info
    optimizer, _ = make_optimizer(config.optim, steps, trained)
    base = Base(like_on(info, mesh) if specs else None)

    def keys(seed):
        return jax.random.split(jax.random.key(seed))  # of the parameters, of the run

    def draw(seed=config.run.seed):
        model = HybridLM(config.model, rngs=nnx.Rngs(keys(seed)[0]))
        return nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])

    def init(seed=config.run.seed):
        of_adapters = lambda: lora.draw(specs, jax.random.fold_in(keys(seed)[0], ADAPTERS))
        return init_from(of_adapters() if specs else draw(seed), seed)

    def init_from(params, seed=config.run.seed):
        zero = jnp.zeros((), jnp.int32)
        return {
            "params": params, "opt_state": optimizer.init(params), "step": zero, "skipped": zero,
            "skipped_in_row": zero, "key": jax.random.key_data(keys(seed)[1]),
        }  # fmt: skip

    def merged(params, *base):
        return lora.merge(*base, params, specs, config.lora.scale) if base else params

    whole = partial(lax.with_sharding_constraint, shardings=param_shardings(info, mesh)) if split else merged
    params_at = (share_shardings if split else param_shardings)(trained, mesh)
    like = _state_like(jax.eval_shape(init), params_at, mesh, config.optim.offload)
    shardings = jax.tree.map(lambda x: x.sharding, like)
    # a loss that blocks take of a batch as a whole, as the balance of experts, is not the sum of those of its parts
    apart = mesh.shape.get("slice", 1) > 1 and not any(kind.loss for kind in statistics(config.model).values())
    model = unrolled(config.model, mesh)
    program = quantize.stacked_graphdef(model, config.quantize)
    layout = make_layout(config, model, mesh, apart)
    objective = _of_weights(make_objective(replace(config, model=model), program), layout.whole)
    rule, prepare = partial(make_optimizer, config.optim, steps, trained), config.optim.objective.prepare
    if specs:
        gradients = make_low_gradients(objective, config, layout, specs, merged)
    else:
        gradients = _make_gradients(objective, config.optim.accumulate, layout)
    step = make_train_step(gradients, rule, prepare, is_bounded(config.optim.rule))
    step = _on_device(step, like, config.optim.offload)

    def evaluate(params, batch, *base):  # what is hidden of a batch hangs on the seed and its text
        batch = prepare(batch, lambda: jax.random.fold_in(jax.random.key(config.run.seed), batch["tokens"].sum()))
        return objective(layout.stack(merged(params, *base)), batch)[1]

    inspect = make_inspect(gradients, rule, config.optim.accumulate, layout, program, prepare, merged)
    inspect = _on_device(inspect, like, config.optim.offload)
    lengths = np.array(schedule_lengths(config.optim, steps), np.int32)
    quick, often = options(platform_of(mesh.devices.flat[0]), once=True), options_on(mesh)
    start = jax.jit(init, out_shardings=shardings, compiler_options=quick)
    start_from = jax.jit(init_from, out_shardings=shardings, compiler_options=quick, donate_argnums=0)
    eval_step = jax.jit(evaluate, compiler_options=often)
    if specs:
        drawn = jax.jit(draw, out_shardings=param_shardings(info, mesh), compiler_options=quick)
        start, start_from = _upon_base(base, start, drawn)
        eval_step = WithBase(eval_step, base)
    return Program(
        init=start,
        init_from=_placed(start_from, shardings["params"]) if split else start_from,
        train_step=TrainStep(
            jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=often), lengths, base
        ),
        eval_step=eval_step,
        inspect=TrainStep(jax.jit(inspect, compiler_options=often), lengths, base),
        state_like=like,
        batch_sharding=batch_sharding(mesh),
        graphdef=graphdef,
        base=base,
        fresh=init,
        whole=whole,
        puts_together=split or bool(specs),
    )


def _of_weights(objective: Callable, whole: bool) -> Callable:
    """The objective of weights that are put together before, or not."""

    def of_whole(params, batch, weight=1.0):
        with whole_weights():
            return objective(params, batch, weight)

    return of_whole if whole else objective


def _placed(start: Callable, at) -> Callable:
    """`init_from` of parameters that may lie elsewhere: XLA cannot reuse the memory of those."""
    return lambda params: start(jax.device_put(params, at))


def _upon_base(base: Base, start: Callable, draw: Callable) -> tuple[Callable, Callable]:
    """`init` and `init_from` of a program with adapters: the parameters become the base, new adapters the state."""

    def init():
        base.params = draw()
        return start()

    def init_from(params):
        base.params = params
        return start()

    return init, init_from


def _on_device(of_state: Callable, like: dict, offload: bool) -> Callable:
    """`of_state(state, ...)` of a state of which a part lies in the host's memory: it is copied to the devices."""

    def here(x, like):
        at = like.sharding
        return jax.device_put(x, at.with_memory_kind("device")) if at.memory_kind == HOST else x

    return (lambda state, *args: of_state(jax.tree.map(here, state, like), *args)) if offload else of_state


def _state_like(shapes: dict, params_at, mesh: Mesh, offload: bool = False) -> dict:
    """The train state's shapes and types with its shardings: those of the parameters, all else everywhere. offload:
    what of the optimizer's state belongs to a parameter lies in the host's memory."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    moments_at = jax.tree.map(lambda at: at.with_memory_kind(HOST), params_at) if offload else params_at
    shardings = jax.tree.map(lambda _: everywhere, shapes) | {
        "params": params_at,
        "opt_state": like_params(shapes["opt_state"], shapes["params"], moments_at, everywhere),
    }
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)


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


def make_train_step(gradients: Callable, make_rule: Callable, prepare: Callable, bounded: bool = False) -> Callable:
    """(state, batch, lengths, *base) -> (state, metrics): the gradient of the mean over all tokens of the batch,
    applied if finite, it and what the optimizer makes of it.

    gradients: see `_make_gradients`. make_rule: (lengths) -> (optimizer, schedule), see `make_optimizer`. prepare: the
    batch, see `optim.objective`. bounded: updates are known to be finite before they are made, see `optim.rules`: then
    arrays are read and written once. Where the loss, the gradient or the update is not finite, parameters and optimizer
    stay as they were, the step counts as skipped, and the objective's metrics are left out.
    """

    def train_step(state, batch, lengths, *base) -> tuple[dict, Metrics]:
        optimizer, schedule = make_rule(lengths)
        batch = prepare(batch, lambda: jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"]))
        with jax.named_scope("gradients"):
            loss, metrics, grads = gradients(state["params"], batch, *base)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            # what they changed by, not what they were to: a GPU adds that up in the pass that writes them
            update_norm = optax.tree.norm(jax.tree.map(jnp.subtract, params, state["params"]))
            lr = jnp.float32(schedule(state["step"] - state["skipped"]))
            ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            ok &= jnp.isfinite(jnp.square(lr)) if bounded else jnp.isfinite(update_norm)
            kept = _choose(ok, (params, opt_state), (state["params"], state["opt_state"]))
        missed = 1 - ok.astype(jnp.int32)
        new_state = {
            "params": kept[0], "opt_state": kept[1], "step": state["step"] + 1, "skipped": state["skipped"] + missed,
            "skipped_in_row": (state["skipped_in_row"] + 1) * missed, "key": state["key"],
        }  # fmt: skip
        latest = {
            "grad_norm": grad_norm, "update_norm": update_norm,
            "lr": lr, "skipped": new_state["skipped"],
            "skipped_in_row": new_state["skipped_in_row"],
        }  # fmt: skip
        of_step = {name: Last(value) for name, value in latest.items()}
        return new_state, merge(_choose(ok, metrics, empty(metrics)), of_step)

    return train_step


def _make_gradients(objective: Callable, n_micro: int, layout: Layout) -> Callable:
    """(params, batch) -> (mean loss of the batch, the objective's metrics, gradient of the mean loss).

    objective: see `make_objective`; of parameters as `layout` stacks them. With n_micro > 1 the gradients of that many
    microbatches are summed in float32 one after the other; the result is that of the whole batch, but for losses that
    blocks take of each microbatch, such as the load balance of experts.
    """

    def gradients(params, batch):
        n_tokens = jnp.maximum(jnp.sum(batch["targets"] >= 0), 1).astype(jnp.float32)
        weights = layout.stack(params)
        if not layout.apart:
            loss, metrics, grads = of_rows(weights, batch, n_tokens)
            return loss, metrics, layout.spread(grads)

        def of_slice(whole, rows):
            loss, metrics, grads = of_rows(whole[0], rows, whole[1])
            return metrics, (loss, jax.tree.map(lambda a: a.astype(jnp.float32), grads))

        metrics, (loss, grads) = per_slice(of_slice, (weights, n_tokens), batch)
        of_slices = [jax.tree.map(lambda x, i=i: x[i], metrics) for i in range(axis_size("slice"))]
        return loss, reduce(merge, of_slices), layout.spread(grads)

    def of_rows(weights, batch, n_tokens):
        mean_loss = partial(objective, weight=1 / n_tokens)
        weights, apart = layout.tables.prepared(weights), ("groups", *layout.tables.names)
        if n_micro == 1:
            own = {name: weights[name] for name in layout.tables.names}
            rest = {name: value for name, value in weights.items() if name not in own}
            asked = rest | {tables.SUMS: layout.tables.zeros(weights)}
            of_all = jax.value_and_grad(lambda w: mean_loss(w | own, batch), has_aux=True)
            (loss, metrics), grads = of_all(asked)
            return loss, metrics, {k: grads[k] for k in rest} | layout.tables.all_summed(grads[tables.SUMS])
        whole = {name: weights[name] for name in apart}
        rest = {name: value for name, value in weights.items() if name not in apart}

        def add(total, micro):
            """Gradients of groups and tables are added where they arise: the gradient of their sums are the sums."""
            loss, sums = total
            of_micro = jax.value_and_grad(lambda w: mean_loss(w | whole, micro), has_aux=True)
            of_tables = {name: sums[name] for name in layout.tables.names}
            (more, of_batch), grads = of_micro(rest | {SUMS: sums["groups"], tables.SUMS: of_tables})
            added = {"groups": grads.pop(SUMS), **grads.pop(tables.SUMS)}
            sums = jax.tree.map(jnp.add, {k: sums[k] for k in grads}, grads) | added
            return (loss + more, layout.placed(sums)), of_batch

        micros = {k: _microbatches(v, n_micro) for k, v in batch.items()}
        (loss, sums), of_micros = lax.scan(add, (jnp.float32(0.0), layout.zeros(weights)), micros)
        return loss, _merged(of_micros, n_micro), layout.summed(sums, weights)

    return gradients


def make_low_gradients(
    objective: Callable, config: Config, layout: Layout, specs: dict[tuple, lora.Spec], whole: Callable
) -> Callable:
    """(adapters, batch, base) -> (mean loss, metrics, gradient of the mean loss by the adapters), as `_make_gradients`.

    The merged matrices are laid out once a step. Their own gradients exist for one depth at a time, where they become
    those of its adapters; what the depths of a symbol share has its adapters merged within the objective.
    """
    n_micro, info = config.optim.accumulate, lora.nested(specs)

    def gradients(low, batch, base):
        n_tokens = jnp.maximum(jnp.sum(batch["targets"] >= 0), 1).astype(jnp.float32)
        weights = layout.stack(whole({"groups": low.get("groups", {})}, base))
        low, back = jax.vjp(layout.stack_low, low)
        if layout.apart:

            def of_slice(args, rows):
                loss, metrics, grads = of_rows(*args, rows)
                return metrics, (loss, grads)

            metrics, (loss, grads) = per_slice(of_slice, (weights, low, n_tokens), batch)
            of_slices = [jax.tree.map(lambda x, i=i: x[i], metrics) for i in range(axis_size("slice"))]
            metrics = reduce(merge, of_slices)
        else:
            loss, metrics, grads = of_rows(weights, low, n_tokens, batch)
        return loss, metrics, lax.with_sharding_constraint(back(grads)[0], param_shardings(info, layout.mesh))

    def of_rows(weights, low, n_tokens, batch):
        def mean_loss(low, micro):
            total, metrics = objective(weights | {lora.LOW: low}, micro)
            return total / n_tokens, metrics

        def add(total, micro):
            (loss, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(low, micro)
            return (total[0] + loss, jax.tree.map(jnp.add, total[1], grads)), metrics

        if n_micro == 1:
            (loss, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(low, batch)
            return loss, metrics, grads
        micros = {k: _microbatches(v, n_micro) for k, v in batch.items()}
        (loss, sums), of_micros = lax.scan(add, (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, low)), micros)
        return loss, _merged(of_micros, n_micro), sums

    return gradients


def _merged(of_micros: Metrics, n_micro: int) -> Metrics:
    """The metrics of all microbatches, from those of each, stacked. So that their names and types are known, no model
    has to be traced beside the one of the microbatch."""
    add = lambda total, one: (merge(total, one), None)
    return lax.scan(add, empty(jax.tree.map(lambda x: x[0], of_micros)), of_micros, unroll=min(n_micro, UNROLLED))[0]


def _microbatches(x_BT, n_micro: int):
    """[n_micro, B / n_micro, T]: every n_micro-th row, so that each device splits the rows that it has."""
    return x_BT.reshape(x_BT.shape[0] // n_micro, n_micro, *x_BT.shape[1:]).swapaxes(0, 1)


def _choose(condition, yes, no):
    """`yes` where the condition holds, else `no`; of trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
