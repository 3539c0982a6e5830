# SPDX-License-Identifier: Apache-2.0
"""An optimizer and a schedule of one's own, as values in a config. docs/contributing/optimizer.md quotes them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import optax

from hybridlm.config import OptimConfig
from hybridlm.errors import require
from tests.contributing.runs import losses, records, resumed_losses, small_run


@dataclass(frozen=True)
class Lion:
    """Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms"): the sign of a blended momentum."""

    betas: tuple[float, float] = (0.9, 0.99)
    """Weights of the momentum in the update, and in the momentum that is kept."""

    def __post_init__(self):
        require(all(0 <= beta < 1 for beta in self.betas), f"betas ({self.betas}) must be in [0, 1)")

    def transform(
        self, rate: Callable[[float], optax.Schedule], lr: float, weight_decay: float, info
    ) -> optax.GradientTransformation:
        """As of every update rule; see hybridlm/optim/rules.py."""
        matrices = jax.tree.map(lambda leaf: leaf.kind == "matrix", info)
        decay = optax.add_decayed_weights(weight_decay, mask=matrices)
        return optax.chain(optax.scale_by_lion(*self.betas), decay, optax.scale_by_learning_rate(rate(lr)))


@dataclass(frozen=True)
class InverseRoot:
    """The peak over the root of the number of updates since the warmup (Vaswani et al. 2017, section 5.3)."""

    def pieces(self, peak: float, warmup: int, steps: int) -> tuple[list[optax.Schedule], list[int]]:
        """As of every schedule; see hybridlm/optim/schedule.py."""
        return [lambda updates: peak / (1 + updates) ** 0.5], []


def test_it_trains_and_resumes(tmp_path):
    config = small_run(tmp_path, optim=OptimConfig(lr=3e-3, rule=Lion(), schedule=InverseRoot(), warmup_steps=2))
    whole = losses(config)
    assert whole[-1] < whole[0] - 0.2
    assert resumed_losses(config, stop=3) == whole


def test_the_schedule_is_followed(tmp_path):
    optim = OptimConfig(lr=1e-3, rule=Lion(), schedule=InverseRoot(), warmup_steps=2)
    rates = [record["lr"] for record in records(small_run(tmp_path, optim=optim))]
    expected = [0, 5e-4, 1e-3, 1e-3 / math.sqrt(2), 1e-3 / math.sqrt(3), 5e-4]
    assert all(math.isclose(rate, wanted, rel_tol=1e-5) for rate, wanted in zip(rates, expected, strict=True))


def test_matrices_alone_are_decayed():
    parameters = {"w": jnp.ones(3), "norm": jnp.ones(3)}
    info = {"w": SimpleNamespace(kind="matrix"), "norm": SimpleNamespace(kind="norm")}
    rule = Lion().transform(optax.constant_schedule, 0.1, 0.5, info)
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, parameters), rule.init(parameters), parameters)
    chex.assert_trees_all_close(updates, {"w": jnp.full(3, -0.05), "norm": jnp.zeros(3)})
