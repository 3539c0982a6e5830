# SPDX-License-Identifier: Apache-2.0
"""Batches that spoil a step, wherever they come, and runs that are told from the start which ones to leave out.

In a test by `monkeypatch`, in a real `train.py` by two lines of its config file, see `poisoned_config`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from hybridlm.config import Config
from hybridlm.data import make_loader
from hybridlm.data.loader import Loader

ROOT = Path(__file__).resolve().parents[2]


def mark(tokens_BT, xp=np):
    """A number that tells batches apart; int32."""
    weights_T = xp.arange(1, tokens_BT.shape[1] + 1, dtype=xp.int32)
    return xp.sum(tokens_BT * weights_T[None], dtype=xp.int32)


def marks(config: Config, numbers: Sequence[int]) -> list[int]:
    """Those of batches of a run, by number; batch n is that of step n + 1."""
    with make_loader(config.data, seed=config.run.seed) as loader:
        found = [int(mark(next(loader)["tokens"])) for _ in range(max(numbers) + 1)]
    assert len(set(found)) == len(found)
    return [found[n] for n in numbers]


def poisoned(make: Callable, bad: Sequence[int], factor: float = np.nan) -> Callable:
    """`train.objective.make_objective` whose loss is multiplied on batches with these marks."""

    def make_poisoned(config, graphdef):
        objective = make(config, graphdef)

        def run(params, batch, weight=1.0):
            total, metrics = objective(params, batch, weight)
            is_bad = jnp.any(mark(batch["tokens"], jnp) == jnp.array(bad, jnp.int32))
            return total * jnp.where(is_bad, factor, 1.0), metrics

        return run

    return make_poisoned


def told(read: Callable, step: int, n: int) -> Callable:
    """`Loader.__next__` that leaves out n batches at a step, the first time that it is there."""
    left = [n]

    def read_on(self: Loader):
        if self.step == step and left:
            self.skip(left.pop())
        return read(self)

    return read_on


def poison(*bad: int) -> None:
    """In this process, for good."""
    from hybridlm.train import step

    step.make_objective = poisoned(step.make_objective, bad)


def tell(step: int, n: int) -> None:
    """In this process, for good."""
    Loader.__next__ = told(Loader.__next__, step, n)


def poisoned_config(config: Path, name: str, *lines: str) -> Path:
    """The config file with calls of `poison` or `tell` before it, under another name."""
    before = [
        "import sys",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "from tests.faults.poison import poison, tell",
        *lines,
    ]
    file = config.with_name(f"{name}.py")
    file.write_text("\n".join(before) + "\n" + config.read_text())
    return file
