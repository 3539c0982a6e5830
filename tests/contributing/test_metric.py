# SPDX-License-Identifier: Apache-2.0
"""A metric: one value returned in one place. docs/contributing/metric.md quotes it."""

from dataclasses import replace

import jax.numpy as jnp
import pytest

from hybridlm.train import step
from hybridlm.train.metrics import Max, Mean, Sum
from hybridlm.train.objective import make_objective
from tests.contributing.runs import records, small_run


def make_objective_with_documents(config, graphdef):
    """`make_objective`, with what a batch's documents are like among its metrics."""
    objective = make_objective(config, graphdef)

    def with_documents(params, batch, weight=1.0):
        loss, metrics = objective(params, batch, weight)
        real_BT = batch["segment_ids"] != 0
        documents = jnp.sum(real_BT & (batch["positions"] == 0)).astype(jnp.float32)
        n_real = jnp.sum(real_BT).astype(jnp.float32)
        return loss, metrics | {
            "documents": Sum(documents),
            "longest": Max(jnp.max(batch["positions"] + 1).astype(jnp.float32)),
            "position": Mean(jnp.sum(batch["positions"] * real_BT).astype(jnp.float32), n_real),
        }

    return with_documents


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "make_objective", make_objective_with_documents)
    return small_run(tmp_path)


def test_it_is_in_every_record(run):
    of_steps = records(run)
    assert all(record["documents"] > 0 and 1 < record["longest"] <= 32 for record in of_steps)


def test_microbatches_and_steps_merge(run):
    three = records(run)[:3]
    again = replace(run.run, log_every=3, dir=f"{run.run.dir}-again")
    first, _ = records(replace(run, optim=replace(run.optim, accumulate=4), run=again))
    assert first["documents"] == sum(record["documents"] for record in three)
    assert first["longest"] == max(record["longest"] for record in three)
    assert first["position"] == pytest.approx(sum(record["position"] for record in three) / 3, rel=1e-5)
