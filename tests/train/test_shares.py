# SPDX-License-Identifier: Apache-2.0
"""The train state split over replicas: the same steps, less memory, checkpoints of either kind."""

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from hybridlm.config import Config, LoraConfig, MeshConfig, ModelConfig, Muon, OptimConfig
from hybridlm.errors import ConfigError
from hybridlm.model.init import abstract
from hybridlm.plan import collectives
from hybridlm.plan.counted import count
from hybridlm.plan.slices import read_devices
from hybridlm.sharding import make_mesh
from hybridlm.train import layout, shares
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.loss import LOGITS
from hybridlm.train.metrics import on_host
from hybridlm.train.step import HOST
from tests.train.conftest import first_state, make_batch, small_config, small_program
from tests.train.test_layout import MODEL
from tests.train.test_step import relative, run_steps

ADAMW = ("optim.name=adamw", "optim.z_loss=1e-3")
SPLIT = "optim.split_over_data=True"


def axes_of(tree) -> set[str]:
    """Mesh axes that split an array of a tree of specs."""
    return {axis for spec in jax.tree.leaves(tree) for axis in jax.tree.leaves(tuple(spec))}


@pytest.fixture
def as_on_gpus(monkeypatch):
    """Sums made by products and by the loss."""
    monkeypatch.setitem(LOGITS, "cpu", 1000)
    monkeypatch.setattr(layout, "APART", {"cpu"})


@pytest.mark.parametrize(
    ("sizes", "micro", "pattern"),
    [
        ((4, 1, 1), 2, "*-"),
        pytest.param((4, 1, 1), 2, "M*-", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), 2, "M*-", marks=pytest.mark.slow),
        pytest.param((4, 1, 1), 1, "M*-", marks=pytest.mark.slow),
    ],
)
def test_the_same_steps(sizes, micro, pattern, as_on_gpus):
    words = (*ADAMW, f"optim.accumulate={micro}", "optim.weight_decay=0.2", f"model.pattern={pattern}")
    whole, history, _ = run_steps((*words, "optim.split_over_data=False"), sizes)
    params, split_history, specs = run_steps((*words, SPLIT), sizes)
    for a, b in zip(split_history, history, strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-5)
    assert relative(params, whole) < 1e-5
    assert "data" in axes_of(specs["params"]) and "data" in axes_of(specs["opt_state"])


def test_sums_of_large_arrays_are_scattered(as_on_gpus):
    """What is added up everywhere is small."""
    config, mesh, program = small_program((*ADAMW, "optim.accumulate=2", "optim.weight_decay=0.3", SPLIT), (4, 1, 1))
    with jax.set_mesh(mesh):
        asked = collectives.of_traced(program.train_step.trace(program.state_like, program.batch_like(config.data)))
    kinds = collectives.totals(asked)
    params = sum(x.size for x in jax.tree.leaves(program.state_like["params"]))
    assert kinds["reduce-scatter data"].bytes > 0.9 * 4 * params > 20 * kinds["all-reduce data"].bytes


def test_checkpoints_of_either_kind_and_moments_on_the_host(tmp_path):
    words = (*ADAMW, "model.pattern=*-")
    config, mesh, program = small_program((*words, SPLIT, "optim.offload=True"), (4, 1, 1))
    with jax.set_mesh(mesh):
        state = first_state(config, program)
        state, _ = program.train_step(state, jax.device_put(make_batch(config, 0), program.batch_sharding))
        metrics = program.eval_step(state["params"], jax.device_put(make_batch(config, 1), program.batch_sharding))
        whole = program.model(state["params"])
    kept = jax.device_get(state)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state["opt_state"]) if x.ndim} == {HOST}
    assert "data" not in axes_of([x.sharding.spec for x in jax.tree.leaves(whole)])
    usual = small_program(words, (1, 2, 1))[2]
    for n, (of, like) in enumerate(((program, usual), (usual, program))):
        checkpoints = Checkpoints(tmp_path / str(n), 2)
        held = jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), kept, of.state_like)
        checkpoints.save(1, held, {"name": "x"}, {"data": {"step": 1}})
        checkpoints.close()
        again, _ = Checkpoints(tmp_path / str(n), 2).restore(1, like.state_like)
        assert jax.tree.map(lambda x: x.sharding, again) == jax.tree.map(lambda x: x.sharding, like.state_like)
        chex.assert_trees_all_equal(jax.device_get(again), kept)
    assert np.isfinite(on_host(metrics)["loss"].value())


@pytest.mark.parametrize(
    ("words", "sizes", "changes", "split"),
    [
        ("h100:4", {"data": 4}, {}, True),
        ("h100:4", {"data": 2, "fsdp": 2}, {}, True),
        ("h100:4", {"fsdp": 4}, {"split_over_data": True}, False),  # there is one replica
        ("h100:4", {"data": 4}, {"split_over_data": False}, False),
        ("h100:4", {"data": 4}, {"rule": Muon()}, False),
        ("v5p:2x2x1", {"data": 4}, {}, False),
        ("v5p:2x2x1", {"data": 4}, {"split_over_data": True}, True),
    ],
)
def test_on_gpus_of_one_process_unless_the_config_says(words, sizes, changes, split):
    devices, config = read_devices(words).described(), Config(model=MODEL, optim=OptimConfig(**changes))
    several = [replace(device, process_index=i) for i, device in enumerate(devices)]
    for places, expected in ((devices, split), (several, split and config.optim.split_over_data is True)):
        mesh = make_mesh(MeshConfig(**{"data": 1} | sizes), places)
        assert shares.splits_state(config, mesh) is expected


@pytest.mark.parametrize(
    ("changes", "sizes", "why"),
    [
        ({"optim": OptimConfig(rule=Muon(), split_over_data=True)}, {"data": 4}, r"optim\.rule \(Muon\) does not"),
        ({"lora": LoraConfig(rank=2)}, {"data": 4}, "adapters"),
        ({}, {"data": 2, "slice": 2}, r"mesh\.slice \(2\) must be 1"),
    ],
)
def test_refused(changes, sizes, why):
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:4])
    config = replace(Config(model=MODEL, optim=OptimConfig(split_over_data=True)), **changes)
    with pytest.raises(ConfigError, match=rf"optim\.split_over_data \(True\): .*{why}"):
        shares.splits_state(config, mesh)
    unsaid = replace(config, optim=replace(config.optim, split_over_data=None))
    assert not shares.splits_state(unsaid, mesh)


def test_outer_dims_are_split_beside_what_splits_them():
    """Rows of matrices and tables; fused dims, vectors and what does not divide are whole."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    model = small_config().model
    found = jax.tree.map(lambda at: tuple(at.spec), shares.share_shardings(abstract(model).info, mesh))
    assert found["embedding"] == (("tensor", "data"), "fsdp")
    mlp, norm = found["groups"][0][2]["mixer"], found["norm"]["weight"]
    assert mlp["w_in"][1] == ("fsdp", "data") and mlp["w_out"][1] == ("tensor", "data")
    assert "data" not in axes_of([norm])
    odd = ModelConfig(vocab_size=63, d_model=6, pattern="-", blocks={"-": model.blocks["-"]})
    odd_mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    at = jax.tree.map(lambda at: tuple(at.spec), shares.share_shardings(abstract(odd).info, odd_mesh))
    assert "data" not in axes_of([at["embedding"], at["groups"][0][0]["mixer"]["w_in"]])


def test_a_plan_counts_a_share():
    devices = read_devices("h100:4")
    of = lambda split: count(small_config(f"optim.split_over_data={split}", "mesh.data=4"), devices)
    whole, split = (sum(of(asked).state.values()) for asked in (False, True))
    assert 0.25 < split / whole < 0.3 and sum(of(None).state.values()) == split
