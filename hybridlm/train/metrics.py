# SPDX-License-Identifier: Apache-2.0
"""Metrics as values that merge themselves: over microbatches in a scan, over steps, over batches of an evaluation.

A number is made a metric once, where it is known: whatever the loss or the step returns in its dict reaches the records
of metrics.jsonl under its name. Metrics are pytrees of scalars; they merge alike under a trace and on the host.
"""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp


class Metric(Protocol):
    """A number with its way to merge."""

    def merge(self, later: Self) -> Self:
        """Of both together."""

    def empty(self) -> Self:
        """What changes no other by merging with it, in the types of this one; this one may be abstract."""

    def value(self) -> float:
        """The number; on the host."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum:
    """Adds up."""

    total: Any

    def merge(self, later):
        return Sum(self.total + later.total)

    def empty(self):
        return Sum(jnp.zeros_like(self.total))

    def value(self):
        return self.total


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """Weighted mean; NaN where all weights are zero."""

    total: Any
    """Sum of weight times value."""
    weight: Any
    """Sum of the weights."""

    def merge(self, later):
        return Mean(self.total + later.total, self.weight + later.weight)

    def empty(self):
        return Mean(jnp.zeros_like(self.total), jnp.zeros_like(self.weight))

    def value(self):
        return self.total / self.weight if self.weight else math.nan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Max:
    """The largest; of floats."""

    largest: Any

    def merge(self, later):
        larger = jnp.maximum if isinstance(self.largest, jax.Array) else max
        return Max(larger(self.largest, later.largest))

    def empty(self):
        return Max(jnp.full_like(self.largest, -jnp.inf))

    def value(self):
        return self.largest


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Last:
    """The latest."""

    latest: Any

    def merge(self, later):
        return later

    def empty(self):
        return Last(jnp.zeros_like(self.latest))

    def value(self):
        return self.latest


Metrics = dict[str, Metric]
KINDS = {kind.__name__: kind for kind in (Sum, Mean, Max, Last)}


def merge(earlier: Mapping[str, Metric], later: Mapping[str, Metric]) -> Metrics:
    """The metrics of both, those of one name merged."""
    return {**earlier, **{name: earlier[name].merge(m) if name in earlier else m for name, m in later.items()}}


def empty(metrics: Mapping[str, Metric]) -> Metrics:
    """The same metrics of nothing."""
    return {name: metric.empty() for name, metric in metrics.items()}


def on_host(metrics: Mapping[str, Metric]) -> Metrics:
    """With numbers of Python, which add up in float64; waits for the device."""
    return jax.tree.map(lambda x: x.item(), jax.device_get(dict(metrics)))


def numbers(values: Mapping[str, jax.Array]) -> dict[str, float]:
    """Scalars of the device as numbers of Python; waits for them."""
    return {name: value.item() for name, value in jax.device_get(dict(values)).items()}


def _fields(metric: Any) -> tuple:
    return astuple(metric)


def to_json(metrics: Mapping[str, Metric]) -> dict[str, list]:
    """Metrics on the host, as a checkpoint keeps them: {"loss": ["Mean", total, weight]}."""
    return {name: [type(metric).__name__, *_fields(metric)] for name, metric in metrics.items()}


def from_json(values: Mapping[str, Any]) -> Metrics:
    """The inverse of to_json; reads the plain sums of checkpoints of before too."""
    if "nats" in values:
        values = _of_plain_sums(values)
    return {name: KINDS[kind](*numbers) for name, (kind, *numbers) in values.items()}


def _of_plain_sums(sums: Mapping[str, float]) -> dict[str, list]:
    """{"nats": ..., "z": ..., "tokens": ..., "router_z": ...}: all but the count of dropped assignments by tokens."""
    names = {"nats": "loss"}
    tokens = sums["tokens"]
    return {
        names.get(name, name): ["Sum", total] if name == "router_dropped" else ["Mean", total, tokens]
        for name, total in sums.items()
        if name != "tokens"
    }


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Bits per byte of text, which compares across tokenizers."""
    return nats_per_token / math.log(2.0) / bytes_per_token
