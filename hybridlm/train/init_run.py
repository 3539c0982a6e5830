# SPDX-License-Identifier: Apache-2.0
"""A run that starts from the parameters of another one: init.run=RUN, of its newest checkpoint, or RUN@STEP."""

from dataclasses import replace
from pathlib import Path

from hybridlm import storage
from hybridlm.config import Config
from hybridlm.config.resume import refused
from hybridlm.errors import ConfigError, require
from hybridlm.train.base import read_params
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.records import finished_steps
from hybridlm.train.run_folder import record_of, stored_config
from hybridlm.train.tokenizer_copy import IDENTITY, check_tokenizer

OTHERWISE = {"compute_dtype", "rope", "window"}
"""Fields of the model that may differ from that run's beside those that may change on resume: they have no parameters,
and a stage of longer rows wants others."""


def split_run(text: str) -> tuple[Path, int | None]:
    """(folder, step or None) of RUN or RUN@STEP; a folder of the whole name comes first."""
    folder, at, step = text.rpartition("@")
    if at and step.isascii() and step.isdecimal() and not storage.exists(storage.as_path(text)):
        return storage.as_path(folder), int(step)
    return storage.as_path(text), None


def check_init_run(config: Config) -> None:
    """ConfigError, one line, where the parameters of init.run cannot be those of this config's model."""
    if config.init.run is None:
        return
    run, step = split_run(config.init.run)
    storage.check(run, "init.run")
    require(
        storage.absolute(run) != storage.absolute(storage.as_path(config.run_dir)),
        f"init.run ({run}) is run.dir itself",
    )
    steps = finished_steps(run / "checkpoints")
    require(bool(steps), f"init.run ({run}) has no checkpoint")
    require(step is None or step in steps, f"init.run ({config.init.run}): step {step} has no checkpoint, only {steps}")
    differing = {
        key: values
        for key, values in refused(stored_config(run, like=config), config).items()
        if key.startswith("model.") and not OTHERWISE & set(key.split("."))
    }
    if differing:
        shown = ", ".join(f"{key} ({a} there, {b} now)" for key, (a, b) in list(differing.items())[:4])
        raise ConfigError(f"init.run ({run}) is of another model: {shown}")
    check_tokenizer(config.data, record_of(run, steps[-1] if step is None else step).get(IDENTITY), run)


def params_of_run(config: Config, like) -> tuple[dict, int]:
    """(parameters, the step that they are of), verified; like: their shapes, types and shardings here."""
    run, step = split_run(config.init.run)
    checkpoints = Checkpoints(run / "checkpoints", keep=1, read_only=True)
    there = replace(stored_config(run, like=config), model=config.model)
    try:
        found = read_params(checkpoints, run, there, like, None if step is None else [step])
    finally:
        checkpoints.close()
    require(found is not None, f"init.run ({run}) has no checkpoint")
    return found[1], found[0]
