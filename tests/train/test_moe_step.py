# SPDX-License-Identifier: Apache-2.0
"""Steps of a model with experts: the router's losses and statistics, devices, accumulation, the record written."""

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from hybridlm.config import MLP, MeshConfig, MoE, Router
from hybridlm.sharding import make_mesh
from hybridlm.train.meter import Meter
from hybridlm.train.metrics import on_host
from hybridlm.train.step import make_program
from tests.train.conftest import first_state, make_batch, small_config

EXPERTS = MoE(4, 16, "swiglu", Router(2), MLP(16), balance_weight=0.1, z_weight=0.01)


def make_config(**optim):
    config = small_config()
    blocks = {"*": config.model.blocks["*"], "E": EXPERTS}
    model = replace(config.model, pattern="*E", blocks=blocks)
    return replace(config, model=model, optim=replace(config.optim, **optim))


ONE = MeshConfig(1)


def run_steps(config, mesh_config=ONE, n_devices=1, n_steps=2, same_batch=False):
    """(parameters, metrics of each step)."""
    mesh = make_mesh(mesh_config, jax.devices()[:n_devices])
    program, history = make_program(config, mesh), []
    with jax.set_mesh(mesh):
        state = first_state(config, program)
        for step in range(n_steps):
            batch = jax.device_put(make_batch(config, 0 if same_batch else step), program.batch_sharding)
            state, metrics = program.train_step(state, batch)
            history.append(on_host(metrics))
        return jax.device_get(state["params"]), history


@pytest.fixture(scope="module")
def one():
    return run_steps(make_config())


def test_expert_mesh_equals_one_device(one):
    params, history = run_steps(make_config(), MeshConfig(1, fsdp=2, expert=4), 8)
    for actual, expected in zip(history, one[1], strict=True):
        chex.assert_trees_all_close(actual, expected, rtol=1e-4)
    chex.assert_trees_all_close(params, one[0], rtol=1e-7, atol=2e-4)


@pytest.mark.slow
def test_accumulation_adds_up_the_statistics(one):
    _, history = run_steps(make_config(accumulate=4), n_steps=1)
    for name in ("loss", "router_dropped"):
        chex.assert_trees_all_close(history[0][name], one[1][0][name], rtol=1e-4)
    assert history[0]["router_balance"].value() >= 1  # of an even load exactly 1, of smaller batches more


def test_losses_train_the_router_and_the_loss_falls():
    """The same batch again and again: fitted, and the experts' load evens out."""
    _, history = run_steps(make_config(), n_steps=20, same_batch=True)
    first, last = ({name: metric.value() for name, metric in history[i].items()} for i in (0, -1))
    assert last["loss"] < 0.8 * first["loss"] and last["router_loss"] < first["router_loss"]
    assert all(metrics["router_dropped"].value() == 0 for metrics in history)


def test_record_of_the_interval(one):
    config = make_config()
    meter = Meter(config, make_mesh(MeshConfig(1), jax.devices()[:1]), 1.0)
    for seconds, metrics in enumerate(one[1]):
        meter.add(metrics, seconds)
    record = meter.values(2)
    tokens = [metrics["loss"].weight for metrics in one[1]]
    for kind in MoE.STATISTICS.values():
        values = [metrics[kind.name].value() for metrics in one[1]]
        expected = sum(values) if kind.batches == "sum" else np.average(values, weights=tokens)
        assert record[kind.name] == pytest.approx(expected, rel=1e-5)
    assert 1 <= record["router_max_load"] <= 4
    assert record["router_dropped"] == 0
