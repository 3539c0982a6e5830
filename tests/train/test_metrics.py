# SPDX-License-Identifier: Apache-2.0
"""Metrics merge the same in one go and in parts, traced and on the host; checkpoints of before are read."""

import json
import math

import chex
import jax
import jax.numpy as jnp
import pytest

from hybridlm.train.metrics import KINDS, Last, Max, Mean, Sum, empty, from_json, merge, on_host, to_json

VALUES = [3.0, -1.0, 2.5, 0.5]
WEIGHTS = [1.0, 4.0, 0.0, 3.0]


def make(i):
    """The metrics of the i-th part, on the device."""
    value, weight = jnp.float32(VALUES[i]), jnp.float32(WEIGHTS[i])
    return {"sum": Sum(value), "mean": Mean(value * weight, weight), "max": Max(value), "last": Last(jnp.int32(i))}


EXPECTED = {"sum": 5.0, "mean": (3.0 - 4.0 + 1.5) / 8, "max": 3.0, "last": 3}


def values(metrics):
    return {name: metric.value() for name, metric in metrics.items()}


def test_all_kinds_are_covered():
    assert {type(metric) for metric in make(0).values()} == set(KINDS.values())


def test_on_the_host():
    merged = {}
    for i in range(4):
        merged = merge(merged, on_host(make(i)))
    assert values(merged) == pytest.approx(EXPECTED)
    assert all(type(leaf) in (float, int) for leaf in jax.tree.leaves(merged))


def test_in_a_scan_from_what_is_empty():
    """As over microbatches: the start is made from shapes alone."""

    def step(total, xs):
        value, weight, i = xs
        parts = {"sum": Sum(value), "mean": Mean(value * weight, weight), "max": Max(value), "last": Last(i)}
        return merge(total, parts), None

    xs = (jnp.array(VALUES), jnp.array(WEIGHTS), jnp.arange(4))
    start = empty(jax.eval_shape(lambda: make(0)))
    chex.assert_trees_all_equal_shapes_and_dtypes(start, make(0))
    merged, _ = jax.jit(lambda xs: jax.lax.scan(step, start, xs))(xs)
    assert values(on_host(merged)) == pytest.approx(EXPECTED)


def test_what_is_empty_changes_nothing_and_a_mean_of_nothing_is_nan():
    some = make(1)
    chex.assert_trees_all_equal(merge(empty(some), some), some)
    for name in ("sum", "mean", "max"):
        chex.assert_trees_all_equal(merge(some, empty(some))[name], some[name])
    assert math.isnan(on_host(empty(some))["mean"].value())


def test_names_that_one_side_lacks_are_kept():
    assert merge({"a": Sum(1)}, {"a": Sum(2), "b": Last(3)}) == {"a": Sum(3), "b": Last(3)}


def test_checkpoint_record():
    metrics = on_host(make(1))
    assert from_json(json.loads(json.dumps(to_json(metrics)))) == metrics


def test_checkpoint_record_of_before():
    """Plain sums: of a token each, but for the count of assignments that experts dropped."""
    dense = {"nats": 30.0, "z": 8.0, "tokens": 10.0}
    assert from_json(dense) == {"loss": Mean(30.0, 10.0), "z": Mean(8.0, 10.0)}
    experts = from_json(dense | {"router_balance": 12.0, "router_dropped": 7.0})
    assert experts["router_balance"] == Mean(12.0, 10.0) and experts["router_dropped"] == Sum(7.0)
