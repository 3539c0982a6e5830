# SPDX-License-Identifier: Apache-2.0
"""A run that starts from the parameters of another one: init.run=RUN, of its newest checkpoint, or RUN@STEP.

The parameters alone: the optimizer's state, the schedule and the order of text begin anew. Row length, mesh, text and
what of the model has no parameters may be others than that run's.
"""

from dataclasses import replace
from pathlib import Path

from hybridlm import storage
from hybridlm.config import Config
from hybridlm.config.resume import changes, refused
from hybridlm.errors import ConfigError, cut, require
from hybridlm.train.base import read_params
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.records import finished_steps
from hybridlm.train.run_folder import record_of, stored_config
from hybridlm.train.tokenizer_copy import IDENTITY, check_tokenizer

OTHERWISE = {"compute_dtype", "rope", "window", "scale"}
"""Fields of the model that may differ from that run's beside those that may change on resume: they have no parameters,
and a stage of longer rows wants others."""


def is_otherwise(key: str) -> bool:
    """Whether a dotted name of the config is of one of these fields, or inside of one."""
    return key.startswith("model.") and bool(OTHERWISE & set(key.split(".")))


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
    there = stored_config(run, like=config)
    require(not there.quantize.stored, f"init.run ({run}) holds a quantised model: name the run that it was made of")
    require(step is None or step in steps, f"init.run ({config.init.run}): step {step} has no checkpoint, only {steps}")
    differing = {
        key: values
        for key, values in refused(there, config).items()
        if key.startswith("model.") and not is_otherwise(key)
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


def told_of_start(config: Config, step: int) -> str:
    """What a run begins with, in words: whose parameters, what begins anew, and what of the model and of its rows is
    other than there."""
    run, _ = split_run(config.init.run)
    found = changes(stored_config(run, like=config), config).items()
    other = [f"{key} {_shown(a)} -> {_shown(b)}" for key, (a, b) in found if key == "data.seq_len" or is_otherwise(key)]
    said = f"parameters of step {step} of {config.init.run}; optimizer state, schedule and order of text begin anew"
    return "; ".join([said, *other])


def _shown(value) -> str:
    return cut(str(value), 80)
