# SPDX-License-Identifier: Apache-2.0
"""The parameters that a run with adapters (`lora`) reads and never changes: its base.

They are no part of the train state, which holds the adapters alone, with the optimizer's state of these. A run keeps
them once, in `base/` of its folder, as a sealed checkpoint of step 0; its checkpoints hold the adapters.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hybridlm.config import Config
from hybridlm.config.tree import to_dict
from hybridlm.errors import RunError
from hybridlm.model import lora
from hybridlm.sharding import param_shardings
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.records import finished_steps

FOLDER = "base"


class Base:
    """What a run's programs take beside their state: nothing, or the base once it is there."""

    def __init__(self, like: dict | None = None):
        """like: shapes, types and shardings; None: a run without adapters."""
        self.like, self.params = like, None

    @property
    def args(self) -> tuple:
        """The last arguments of a program."""
        if self.like is None:
            return ()
        return (self.like if self.params is None else self.params,)


class WithBase:
    """A jitted function that takes the base behind its other arguments."""

    def __init__(self, jitted, base: Base):
        self._jitted, self._base = jitted, base

    def __call__(self, *args):
        """The function."""
        return self._jitted(*args, *self._base.args)

    def lower(self, *args):
        """As of every jitted function."""
        return self._jitted.lower(*args, *self._base.args)

    def trace(self, *args):
        """As of every jitted function."""
        return self._jitted.trace(*args, *self._base.args)


def like_on(info: dict, mesh: Mesh) -> dict:
    """Shapes, types and shardings of parameters, or of adapters, on a mesh. info: their ParamInfo."""
    at = param_shardings(info, mesh)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, "float32", sharding=s), info, at)


def save_base(run: Path, params: dict, config: Config, may_finish: Callable[[], None]) -> None:
    """Writes the base of a run, in the place of one that is there, and waits for it. RunError where it cannot."""
    checkpoints = Checkpoints(run / FOLDER, keep=1, may_finish=may_finish)
    try:
        checkpoints.supersede(after=-1)
        checkpoints.save(0, {"params": params}, to_dict(config), {})
    finally:
        checkpoints.close()


def load_base(run: Path, like: dict) -> dict:
    """The base of a run's folder, verified; RunError, one line, where it is missing or damaged."""
    if not finished_steps(run / FOLDER):
        raise RunError(f"{run / FOLDER}, which holds what the run's adapters belong to, is missing: put it back")
    checkpoints = Checkpoints(run / FOLDER, keep=1, read_only=True)
    try:
        return checkpoints.restore(0, {"params": like})[0]["params"]
    finally:
        checkpoints.close()


def read_params(
    checkpoints: Checkpoints, run: Path, config: Config, like: dict, steps: list[int] | None
) -> tuple[int, dict, dict] | None:
    """(step, parameters, loop record) of the newest checkpoint of a run, adapters merged; None where there is none.

    config: that run's. like: shapes, types and shardings of its model's parameters.
    """
    if not config.lora.on:
        found = checkpoints.restore_latest({"params": like}, steps)
        return None if found is None else (found[0], found[1]["params"], found[2])
    specs = lora.adapters(config.model, config.lora)
    found = checkpoints.restore_latest({"params": _adapters_like(specs, like)}, steps)
    if found is None:
        return None
    step, state, record = found
    base = load_base(run, like)
    merge = partial(lora.merge, specs=specs, scale=config.lora.scale)
    shardings = jax.tree.map(lambda x: x.sharding, like)
    with jax.set_mesh(_mesh_of(jax.tree.leaves(shardings)[0])):  # one in force may have other devices
        merged = jax.jit(merge, out_shardings=shardings)(base, state["params"])
    return step, merged, record


def _mesh_of(at: jax.sharding.Sharding) -> Mesh:
    """The mesh that arrays lie on, of one device where they lie on that alone."""
    if isinstance(at, NamedSharding):
        return at.mesh
    return Mesh(np.array(list(at.device_set)), ("device",))


def _adapters_like(specs: dict[tuple, lora.Spec], like: dict) -> dict[str, Any]:
    """Shapes, types and shardings of adapters whose base lies as `like` does."""
    at = jax.tree.leaves(like)[0].sharding
    info = lora.nested(specs)
    if isinstance(at, NamedSharding):
        return like_on(info, at.mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float32", sharding=at), info)


def memory_told(config: Config, state: dict, base: dict) -> str:
    """What adapters save, in words: parameters that are trained, and bytes of the train state."""
    n, n_base = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state["params"], base))
    held = sum(x.nbytes for x in jax.tree.leaves({k: state[k] for k in ("params", "opt_state")}))
    return (
        f"adapters of rank {config.lora.rank}: {n:,} parameters are trained, {n_base:,} stay as they are; "
        f"{held / 1e6:,.1f} MB of parameters and optimizer beside the {4 * n_base / 1e6:,.1f} MB of the base"
    )
