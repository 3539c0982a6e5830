# SPDX-License-Identifier: Apache-2.0
"""Gradients and updates by kind of block, against what a step does; an inspected run is the run that is not."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm.cli import train_main
from hybridlm.train.metrics import numbers
from hybridlm.train.metrics_log import read_metrics
from tests.train.conftest import first_state, make_batch, small_config, small_program

WORDS = ("optim.clip_norm=0.1", "model.pattern=M*-M*--")
KIND = {"M": "M.Mamba2", "*": "*.Attention", "-": "-.MLP"}


@cache
def inspected(overrides=(), mesh_sizes=(1, 1, 1), steps=2):
    """(numbers of the step that comes, the state before it and after it, the batch)."""
    config, mesh, program = small_program((*WORDS, *overrides), mesh_sizes)
    with jax.set_mesh(mesh):
        state = first_state(config, program)
        for step in range(steps):
            state, _ = program.train_step(state, make_batch(config, step))
        batch = jax.device_put(make_batch(config, steps), program.batch_sharding)
        found, before = numbers(program.inspect(state, batch)), jax.device_get(state)
        after, _ = program.train_step(state, batch)
        return found, before, jax.device_get(after), jax.device_get(batch)


def by_kind(params):
    """{kind: one long array}; of the pattern M*-M*--, whose two groups are M*- twice and - once."""
    parts = {name: [value] for name, value in params.items() if name != "groups"}
    for units, group in zip(("M*-", "-"), params["groups"].values(), strict=True):
        for symbol, sublayer in zip(units, group.values(), strict=True):
            parts.setdefault(KIND[symbol], []).append(sublayer)
    return {kind: np.concatenate([np.ravel(a) for a in jax.tree.leaves(part)]) for kind, part in parts.items()}


@pytest.mark.slow
def test_updates_are_those_of_the_step():
    found, before, after, _ = inspected()
    weights, new = by_kind(before["params"]), by_kind(after["params"])
    assert {name.rpartition("/")[0] for name in found} == weights.keys() >= set(KIND.values()) | {"embedding", "norm"}
    for kind, weight in weights.items():
        norm = np.linalg.norm(weight)
        assert found[f"{kind}/weight_norm"] == pytest.approx(norm, rel=1e-5)
        ratio = np.linalg.norm(new[kind] - weight) / norm
        assert found[f"{kind}/update_ratio"] == pytest.approx(ratio, rel=1e-3), kind
        assert ratio > 0


@pytest.mark.slow
def test_gradients_are_those_of_the_mean_loss():
    _, _, program = small_program(WORDS, (1, 1, 1))
    found, before, _, batch = inspected()

    def mean(params):
        model = nnx.merge(program.graphdef, params)
        logits = model(batch["tokens"], batch["segment_ids"], batch["positions"])
        valid = batch["targets"] >= 0
        target = jnp.maximum(batch["targets"], 0)[:, :, None]
        nats = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target, -1)[:, :, 0]
        return jnp.sum(nats * valid) / valid.sum()

    grads = by_kind(jax.device_get(jax.jit(jax.grad(mean))(before["params"])))
    for kind, grad in grads.items():
        assert found[f"{kind}/grad_norm"] == pytest.approx(np.linalg.norm(grad), rel=1e-4), kind
    assert {"M.Mamba2/dt_mean", "M.Mamba2/state_norm_max", "*.Attention/entropy_min"} < found.keys()
    assert "-.MLP/dt_mean" not in found and small_config().run.inspect_every == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "mesh_sizes"),
    [((), (2, 2, 2)), ((), (1, 2, 1, 4)), (("optim.accumulate=4",), (1, 1, 1)), (("optim.accumulate=2",), (2, 2, 2))],
)
def test_devices_and_microbatches(overrides, mesh_sizes):
    """Alike on eight devices; with microbatches, gradients and updates, while mixers speak of the first alone."""
    expected, (found, *_) = inspected()[0], inspected(overrides, mesh_sizes)
    names = [name for name in expected if not overrides or name.rpartition("/")[2] in NORMS]
    assert found.keys() == expected.keys()
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


@pytest.mark.slow
def test_muon():
    found, before, after, _ = inspected(("optim.name=muon",))
    weights, new = by_kind(before["params"]), by_kind(after["params"])
    for kind, weight in weights.items():
        ratio = np.linalg.norm(new[kind] - weight) / np.linalg.norm(weight)
        assert found[f"{kind}/update_ratio"] == pytest.approx(ratio, rel=1e-3), kind


NORMS = ("grad_norm", "weight_norm", "update_ratio")


def test_an_inspected_run_is_the_run_that_is_not(mini, one_device):
    words = ["--config", str(mini), "--run.eval_every=-1", "--run.sample_tokens=0", "--run.log_every=1"]
    words += ["--run.save_every=0"]
    run, other = mini.parent / "run", mini.parent / "other"
    assert train_main([*words, "--run.steps=4", f"--run.dir={other}"]) == 0
    assert train_main([*words, "--run.steps=4", "--run.inspect_every=2"]) == 0
    runs = [read_metrics(folder / "metrics.jsonl") for folder in (run, other)]
    steps = [[(r["step"], r["loss"], r["grad_norm"]) for r in records if r["kind"] == "train"] for records in runs]
    assert steps[0] == steps[1] and len(steps[0]) == 4
    inspections = [record for record in runs[0] if record["kind"] == "inspect"]
    assert [record["step"] for record in inspections] == [2, 4]
    assert all(isinstance(inspections[0][f"M.Mamba2/{name}"], float) for name in ("grad_norm", "decay_min", "dt_max"))
    assert not [record for record in runs[1] if record["kind"] == "inspect"]
