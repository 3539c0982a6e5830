# SPDX-License-Identifier: Apache-2.0
"""One optimizer step: accumulation, devices, clipping, steps that are not finite."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hybridlm.config import OptimConfig
from hybridlm.layers.params import ParamInfo
from hybridlm.optim.optimizer import make_optimizer
from hybridlm.plan import collectives
from hybridlm.plan.collectives import Totals
from hybridlm.train import layout
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.loss import LOGITS
from hybridlm.train.metrics import Mean, on_host
from hybridlm.train.step import HOST, like_params, make_train_step
from tests.train.conftest import first_state, make_batch, small_config, small_program


def run_steps(overrides=(), mesh_sizes=(1, 1, 1), n_steps=3, draw=first_state):
    """(parameters, metrics of each step, specs of the state) on a mesh of data, fsdp, tensor, context. draw: (config,
    program) -> the first state."""
    config, mesh, program = small_program(tuple(overrides), mesh_sizes)
    with jax.set_mesh(mesh):
        state, history = draw(config, program), []
        for step in range(n_steps):
            batch = jax.device_put(make_batch(config, step), program.batch_sharding)
            state, metrics = program.train_step(state, batch)
            history.append(on_host(metrics))
        return jax.device_get(state["params"]), history, jax.tree.map(lambda x: x.sharding.spec, state)


def relative(actual, expected):
    """Largest relative RMS difference of the arrays of two trees."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6) for a, b in pairs)


def options(name):
    return (f"optim.name={name}", "optim.z_loss=1e-3")


@pytest.fixture(scope="module")
def reference():
    """Three steps of each optimizer on one device."""
    return {name: run_steps(options(name)) for name in ("adamw", "muon")}


def test_accumulation_equals_one_batch(reference):
    params, history, _ = reference["adamw"]
    split, split_history, _ = run_steps((*options("adamw"), "optim.accumulate=4"))
    tokens = [make_batch(small_config(), step)["targets"] for step in range(3)]
    per_micro = [np.sum(t.reshape(2, 4, -1) >= 0, axis=(0, 2)) for t in tokens]
    assert all(len(set(counts)) > 1 for counts in per_micro), "the microbatches should hold different numbers of tokens"
    for a, b in zip(split_history, history, strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-4)
    assert relative(split, params) < 2e-4


def with_padding_anywhere(batch, seed=0):
    """The rows with their padding among the real tokens, which keep their order."""
    rng, real_BT = np.random.default_rng(seed), batch["segment_ids"] != 0
    moved = {name: np.zeros_like(a) - (name == "targets") for name, a in batch.items()}
    for row, real_T in enumerate(real_BT):
        places = np.sort(rng.permutation(len(real_T))[: real_T.sum()])
        for name, a in batch.items():
            moved[name][row, places] = a[row, real_T]
    return moved


def test_padding_stands_anywhere_and_nothing_is_decided_at_run_time(reference):
    """A step of the same documents, wherever padding stands; devices wait for each other where a program decides."""
    config, mesh, program = small_program(options("adamw"))
    batch = make_batch(config, 0)
    moved, found = with_padding_anywhere(batch), []
    assert (moved["segment_ids"] != batch["segment_ids"]).any()
    with jax.set_mesh(mesh):
        for rows in (batch, moved):
            rows = jax.device_put(rows, program.batch_sharding)
            state, metrics = program.train_step(first_state(config, program), rows)
            found.append((jax.device_get(state["params"]), on_host(metrics)))
        jaxpr = program.train_step.trace(program.state_like, program.batch_like(config.data)).jaxpr
    (params, metrics), (moved_params, moved_metrics) = found
    chex.assert_trees_all_close(moved_metrics, metrics, rtol=1e-5)
    assert relative(moved_params, params) < 2e-4
    assert "cond[" not in str(jaxpr)
    assert "sort[" not in str(jaxpr)  # on CPUs: what has sorted cannot be written to the cache of programs


MESHES = {"fsdp": (1, 8, 1), "tensor": (4, 1, 2), "both": (2, 2, 2), "data": (8, 1, 1), "context": (1, 2, 1, 4)}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param("adamw", "fsdp", marks=pytest.mark.slow),
        ("muon", "both"),
        pytest.param("adamw", "tensor", marks=pytest.mark.slow),
        pytest.param("adamw", "context", marks=pytest.mark.slow),
        pytest.param("adamw", "data", marks=pytest.mark.slow),
        pytest.param("adamw", "both", marks=pytest.mark.slow),
        pytest.param("muon", "fsdp", marks=pytest.mark.slow),
        pytest.param("muon", "tensor", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_equal_one(reference, name, mesh):
    params, history, _ = reference[name]
    many, many_history, specs = run_steps(options(name), MESHES[mesh], draw=lambda _, program: program.init())
    for a, b in zip(many_history, history, strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-4)
    assert relative(many, params) < 5e-4
    used = {axis for spec in jax.tree.leaves(specs["opt_state"]) for axis in jax.tree.leaves(tuple(spec))}
    split = {"fsdp": {"fsdp"}, "tensor": {"tensor"}, "both": {"fsdp", "tensor"}, "data": set(), "context": {"fsdp"}}
    assert used >= split[mesh]


def gathers(config, mesh, program) -> int:
    """Gathers over fsdp that a step asks for at the use of a matrix or a table."""
    with jax.set_mesh(mesh):
        traced = program.train_step.trace(program.state_like, program.batch_like(config.data))
        return collectives.totals(collectives.of_traced(traced)).get("all-gather fsdp", Totals()).runs


def test_matrices_gathered_once_a_step(reference, monkeypatch):
    """The same step, gradients scattered once a step, too, and sums made by products and the loss as on GPUs; of the
    gathers at each use in each microbatch those of tables are left."""
    params, history, _ = reference["adamw"]
    words, sizes = (*options("adamw"), "optim.accumulate=4"), (1, 2, 2)
    with monkeypatch.context() as patch:
        patch.setitem(LOGITS, "cpu", 1000)
        patch.setattr(layout, "APART", {"cpu"})
        many, many_history, specs = run_steps((*words, "optim.gather_once=True", "optim.scatter_once=True"), (1, 2, 1))
    for a, b in zip(many_history, history, strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-4)
    assert relative(many, params) < 5e-4
    assert "fsdp" in {a for spec in jax.tree.leaves(specs["params"]) for a in jax.tree.leaves(tuple(spec))}
    each, once = (gathers(*small_program((*words, *more), sizes)) for more in ((), ("optim.gather_once=True",)))
    assert 0 < once < each / 4


def test_moments_in_the_memory_of_the_host(reference, tmp_path):
    """The same step, on a mesh, too; a checkpoint goes from either memory to the other."""
    params, history, _ = reference["adamw"]
    config, mesh, program = small_program((*options("adamw"), "optim.offload=True"), (1, 2, 1))
    with jax.set_mesh(mesh):
        state = first_state(config, program)
        for step in range(3):
            batch = jax.device_put(make_batch(config, step), program.batch_sharding)
            state, metrics = program.train_step(state, batch)
            chex.assert_trees_all_close(on_host(metrics), history[step], rtol=1e-4)
        program.inspect(state, batch)  # reads the moments, too
    assert relative(jax.device_get(state["params"]), params) < 5e-4
    kinds = lambda tree: [x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim]
    assert set(kinds(state["opt_state"])) == {HOST} and HOST not in kinds(state["params"])
    checkpoints = Checkpoints(tmp_path / "c", 2)
    checkpoints.save(3, state, {"name": "x"}, {"data": {"step": 3}})
    checkpoints.close()
    usual = small_program(options("adamw"), (1, 2, 1))[2]
    for like, kind in ((usual.state_like, "device"), (program.state_like, HOST)):
        again, _ = Checkpoints(tmp_path / "c", 2).restore(3, like)
        assert set(kinds(again["opt_state"])) == {kind}
        chex.assert_trees_all_equal(jax.device_get(again), jax.device_get(state))


def test_mean_over_all_tokens_of_the_batch():
    _, history, _ = run_steps((*options("adamw"), "optim.accumulate=4"), n_steps=1)
    config, _, program = small_program(options("adamw"))
    batch, params = make_batch(config, 0), first_state(config, program)["params"]

    def mean(params):
        model = nnx.merge(program.graphdef, params)
        logits = model(batch["tokens"], batch["segment_ids"], batch["positions"])
        valid = batch["targets"] >= 0
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, np.where(valid, batch["targets"], 0))
        z = jax.nn.logsumexp(logits, axis=-1) ** 2
        return jnp.sum((nats + config.optim.z_loss * z) * valid) / valid.sum()

    loss, grads = jax.jit(jax.value_and_grad(mean))(params)
    ours = history[0]["loss"].value() + config.optim.z_loss * history[0]["z"].value()
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    np.testing.assert_allclose(history[0]["grad_norm"].value(), optax.tree.norm(grads), rtol=1e-4)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    config, _, program = small_program(options("adamw"))
    state, _ = program.train_step(first_state(config, program), make_batch(config, 0))
    poisoned = jax.tree.map(jnp.copy, state)
    poisoned["params"]["embedding"] = poisoned["params"]["embedding"].at[3, 0].set(jnp.nan)
    before = jax.device_get(poisoned)
    after, metrics = program.train_step(poisoned, make_batch(config, 1))
    assert on_host(metrics)["loss"] == Mean(0.0, 0.0) and not np.isfinite(metrics["grad_norm"].value())
    for name in ("params", "opt_state"):
        chex.assert_trees_all_equal(after[name], before[name])
    assert (int(after["step"]), int(after["skipped"]), int(after["skipped_in_row"])) == (2, 1, 1)
    after, _ = program.train_step(after, make_batch(config, 2))
    assert (int(after["step"]), int(after["skipped"]), int(after["skipped_in_row"])) == (3, 2, 2)
    after["params"] = jax.tree.map(jnp.copy, state["params"])
    after, metrics = program.train_step(after, make_batch(config, 3))
    assert (int(after["step"]), int(metrics["skipped"].value()), int(metrics["skipped_in_row"].value())) == (4, 2, 0)
    assert np.isfinite(on_host(metrics)["loss"].value()) and relative(after["params"], state["params"]) > 0


def test_an_update_that_is_not_finite_is_not_applied():
    """Where loss and gradient are: a moment of one number is out of range, or all of the update is."""
    config, _, program = small_program(options("muon"))
    state, _ = program.train_step(first_state(config, program), make_batch(config, 0))
    is_moment = lambda path: "'norm'" in (words := jax.tree_util.keystr(path)) and ".mu" in words
    for value in (jnp.nan, jnp.inf, 1e30):
        poisoned = jax.tree.map(jnp.copy, state)
        poison = lambda path, a, value=value: a.at[..., 3].set(value) if is_moment(path) else a
        poisoned["opt_state"] = jax.tree_util.tree_map_with_path(poison, poisoned["opt_state"])
        before = jax.device_get(poisoned)
        after, metrics = program.train_step(poisoned, make_batch(config, 1))
        metrics = on_host(metrics)
        assert np.isfinite(metrics["grad_norm"].value()) and not np.isfinite(metrics["update_norm"].value())
        assert metrics["loss"] == Mean(0.0, 0.0) and metrics["skipped_in_row"].value() == 1
        for name in ("params", "opt_state"):
            chex.assert_trees_all_equal(after[name], before[name])
    after, metrics = program.train_step(state, make_batch(config, 1))
    before, after = jax.device_get((first_state(config, program)["params"], after["params"]))
    assert metrics["update_norm"].value() > 0 and relative(after, before) > 0


def test_bounded_updates_are_applied_as_others():
    """A loss, a gradient or a rate that is not finite changes nothing."""
    params = {"w": jnp.linspace(-1, 1, 12).reshape(3, 4), "b": jnp.ones(4)}
    info = {
        "w": ParamInfo(("d_model", None), "matrix", 1, (), False, (3, 4)),
        "b": ParamInfo((None,), "bias", 0, (), False, (4,)),
    }

    def step_of(lr, bounded):
        config = OptimConfig(lr=lr, warmup_steps=0, schedule="constant")
        rule = partial(make_optimizer, config, 10, info)
        gradients = lambda params, batch: (batch["loss"], {}, batch["grads"])
        step = jax.jit(make_train_step(gradients, rule, lambda batch, _: batch, bounded))
        zero = jnp.int32(0)
        counts = {"step": zero, "skipped": zero, "skipped_in_row": zero, "key": jax.random.key_data(jax.random.key(0))}
        return step, {"params": params, "opt_state": rule()[0].init(params)} | counts

    def after(lr, bounded, loss, at):
        step, state = step_of(lr, bounded)
        for n in (1.0, 2.0):
            grads = jax.tree.map(lambda a, n=n: jnp.cos(n * a), params)
            state, _ = step(state, {"loss": jnp.float32(0), "grads": grads}, None)
        grads["w"] = grads["w"].at[1, 2].set(at)
        return state, *step(state, {"loss": jnp.float32(loss), "grads": grads}, None)

    for loss, at in ((1.0, 0.5), (jnp.nan, 0.5), (1.0, jnp.inf), (1.0, 1e30)):
        first, second = after(0.1, True, loss, at), after(0.1, False, loss, at)
        chex.assert_trees_all_close(first[1], second[1], rtol=1e-6)
        chex.assert_trees_all_close(first[2]["update_norm"].value(), second[2]["update_norm"].value(), rtol=1e-6)
        assert int(first[1]["skipped"]) == int(second[1]["skipped"]) == ((loss, at) != (1.0, 0.5))
    before, last, metrics = after(1e20, True, 1.0, 0.5)
    chex.assert_trees_all_equal(last["params"], before["params"], params)
    assert int(last["skipped"]) == 3 and not np.isfinite(metrics["update_norm"].value())


def test_a_profile_names_the_parts_of_a_step():
    config, mesh, program = small_program(options("adamw"))
    with jax.set_mesh(mesh):
        text = program.train_step.lower(program.state_like, make_batch(config, 0)).as_text(debug_info=True)
    for scope in ("gradients/jvp(loss)", "gradients/transpose(jvp(loss))", "optimizer"):
        assert f"/{scope}/" in text, scope


def test_clipping_scales_to_the_global_norm():
    info = {"w": ParamInfo(("d_model", None), "matrix", 1, (), False, (2, 2))}
    config = small_config("optim.clip_norm=0.5").optim
    optimizer, _ = make_optimizer(config, 10, info)
    grads = {"w": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
    state = optimizer.init({"w": jnp.zeros((2, 2))})
    _, state = optimizer.update(grads, state, {"w": jnp.zeros((2, 2))})
    moment = optax.tree_utils.tree_get(state, "mu")["w"]
    np.testing.assert_allclose(moment, (1 - config.betas[0]) * grads["w"] * 0.1, rtol=1e-6)


def test_optimizer_state_lies_like_its_parameters():
    params = {"a": jnp.zeros((2, 3)), "b": {"a": jnp.zeros((4,))}}
    state = optax.adam(1e-3).init(params)
    placed = like_params(state, params, {"a": "A", "b": {"a": "B"}}, "everywhere")
    assert placed[0].mu == {"a": "A", "b": {"a": "B"}} == placed[0].nu and placed[0].count == "everywhere"
