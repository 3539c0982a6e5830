# SPDX-License-Identifier: Apache-2.0
"""What a run has trained, read from its folder: on one device, or over a mesh."""

import os
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding

from hybridlm import storage
from hybridlm.config import Config, DataConfig
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import require
from hybridlm.model import quantize
from hybridlm.model.init import Abstract, check_model
from hybridlm.model.model import HybridLM
from hybridlm.sharding import MESH_AXES, mesh_in_force, param_shardings
from hybridlm.train.base import read_params
from hybridlm.train.checkpoint import Checkpoints, finished_steps
from hybridlm.train.run_folder import stored_config
from hybridlm.train.tokenizer_copy import IDENTITY, check_tokenizer, kept_tokenizer


class LoadedRun(NamedTuple):
    """What `load_run` gives."""

    model: HybridLM
    """With the parameters of the step."""
    tokenizer: Tokenizer
    """The one that the run was trained with."""
    config: Config
    """Of the whole run."""
    step: int
    """Steps that the parameters were trained for."""


def load_run(
    folder: str | os.PathLike[str],
    step: int | None = None,
    *,
    mesh: Mesh | None = None,
    like: Config | None = None,
    tokenizer: str | None = None,
) -> LoadedRun:
    """The model of a run, with its tokenizer, config and step.

    Args:
      folder: of the run, as `runs/hybrid_tiny`, on a disk or in a bucket.
      step: of one of its checkpoints; None: the newest.
      mesh: devices over which the parameters are laid out, each born where it belongs; None: the mesh of
        `jax.set_mesh`, or the first device of this process where none is set. Axes are those of
        `hybridlm.sharding.MESH_AXES`, by name, and Auto; over others parameters are whole on every device.
      like: a config whose own classes the run may have used, see `hybridlm.config.stored.from_dict`.
      tokenizer: as data.tokenizer; None: that of the run.

    Raises ConfigError, one line, where there is no such run or step, where the tokenizer is another one, and where the
    mesh cannot split the model.
    """
    path = storage.as_path(folder)
    model, config, record, found = load_model(path, step, like, mesh)
    identity = record.get(IDENTITY)
    if tokenizer is None:
        return LoadedRun(model, kept_tokenizer(config.data, path, identity), config, found)
    return LoadedRun(model, check_tokenizer(DataConfig(tokenizer=tokenizer), identity, path), config, found)


def load_model(
    path: Path, step: int | None = None, like: Config | None = None, mesh: Mesh | None = None
) -> tuple[HybridLM, Config, dict, int]:
    """(model, config, loop record, step); as load_run, but for the tokenizer."""
    mesh = mesh_in_force() if mesh is None else mesh
    storage.check(path, "the run's folder")
    config = stored_config(path, like)
    steps = finished_steps(path / "checkpoints")
    require(bool(steps), f"{path} has no checkpoint yet")
    require(step is None or step in steps, f"step ({step}) has no checkpoint in {path}: there are {steps}")
    model = quantize.of_run(config.model, config.quantize)
    if mesh is not None:
        _check_mesh(mesh)
        check_model(config.model, mesh)
    places = _places(model, mesh)
    wanted = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), model.shapes, places)
    wanted = quantize.as_dicts(wanted)
    checkpoints = Checkpoints(path / "checkpoints", keep=1, read_only=True)
    try:
        read = read_params(checkpoints, path, config, wanted, steps if step is None else [step])
    finally:
        checkpoints.close()
    assert read is not None  # of steps that are there one is read, or that none can be is an error
    found, params, record = read
    return nnx.merge(model.graphdef, quantize.from_dicts(params)), config, record, found


def _check_mesh(mesh: Mesh) -> None:
    """ConfigError for an axis that has a name of ours and would not split what ours do."""
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        require(
            name not in MESH_AXES or kind == AxisType.Auto,
            f"mesh axis {name} ({kind.name}) must be Auto: make the mesh by hybridlm.make_mesh, or with "
            "axis_types=(AxisType.Auto, ...)",
        )


def _places(model: Abstract, mesh: Mesh | None):
    """Where each parameter is to be, a tree of shardings."""
    if mesh is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: here, model.shapes)
    places: dict[str, NamedSharding] = param_shardings(model.info, mesh)
    return places
