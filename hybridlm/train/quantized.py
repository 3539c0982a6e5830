# SPDX-License-Identifier: Apache-2.0
"""A quantised model as the folder of a run: of a run's checkpoint, or of a published one."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from hybridlm import storage
from hybridlm.config import Config, DataConfig, InitConfig, LoraConfig, QuantizeConfig
from hybridlm.config.tree import to_dict
from hybridlm.data import load_tokenizer
from hybridlm.errors import require
from hybridlm.hf.checkpoint import open_checkpoint, tokenizer_of
from hybridlm.hf.load import COMPUTE, Progress, from_hf
from hybridlm.model import quantize
from hybridlm.model.quantize import Row
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.records import finished_steps
from hybridlm.train.run_folder import RunFolder, is_published, stored_config
from hybridlm.train.sample import load_model
from hybridlm.train.tokenizer_copy import FILES, IDENTITY, check_tokenizer, keep_tokenizer, kept_tokenizer

TABLE = "quantized.txt"
"""File of the folder that says what its parameters are."""


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, perhaps without a checkpoint yet, and no published one."""
    file = folder / "config.json"
    return bool(finished_steps(folder / "checkpoints")) or (storage.exists(file) and not is_published(file))


def quantize_run(
    source: Path, target: Path, given: Mapping[str, Any], step: int | None = None, own: Config | None = None
) -> tuple[Config, int]:
    """Writes the model of a run's checkpoint (the newest, or that of a step), quantised, as the folder of a run with
    one checkpoint of that step; gives its config and the step.

    given: fields of QuantizeConfig; others are those that the run was trained with. own: a config whose own classes the
    run may have used. ConfigError, one line, for a folder that is not empty, a run that cannot be read or is quantised.
    """
    _check_target(target)
    stored = stored_config(source, own)
    require(not stored.quantize.stored, f"{source} holds a quantised model: name the run that it was made of")
    how = _how(given, stored.quantize)
    make = quantize.parameters(stored.model, how)  # says what cannot be before anything is read
    model, config, record, step = load_model(source, step, own)
    identity = record.get(IDENTITY)
    kept_tokenizer(config.data, source, identity)
    copy = source / "tokenizer" / FILES[0]
    data = replace(config.data, tokenizer=str(copy)) if storage.exists(copy) else config.data
    config = replace(
        config, lora=LoraConfig(), init=InitConfig(run=str(source)), quantize=replace(how, stored=True),
        run=replace(config.run, dir=str(target)),
    )  # fmt: skip
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    _write(target, config, make(params), step, data, identity)
    return config, step


def quantize_published(
    source: Path, target: Path, given: Mapping[str, Any], tokenizer: str | None = None, progress: Progress | None = None
) -> Config:
    """The same of a folder with config.json and safetensors; the checkpoint is of step 0.

    tokenizer: as data.tokenizer; None: the one in the folder, or to be given.
    """
    _check_target(target)
    checkpoint = open_checkpoint(source)
    how = _how(given, QuantizeConfig())
    make = quantize.parameters(checkpoint.config, how)
    told = tokenizer_of(source, checkpoint.config) if tokenizer is None else tokenizer
    data = replace(DataConfig(), tokenizer=told)
    if told:
        load_tokenizer(told)
    model = from_hf(source, dtype=COMPUTE.get(checkpoint.dtype, "bfloat16"), progress=progress)
    config = Config(
        name=storage.absolute(source).name, model=model.config, data=data, quantize=replace(how, stored=True),
        init=InitConfig(hf=str(storage.absolute(source))),
    )  # fmt: skip
    config = replace(config, run=replace(config.run, dir=str(target)))
    identity = check_tokenizer(data, None, target).fingerprint if told else None
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    _write(target, config, make(params), 0, data, identity)
    return config


def _how(given: Mapping[str, Any], trained: QuantizeConfig) -> QuantizeConfig:
    """What is asked for, else what was trained for where that is of the same weights, else int8."""
    weights = given.get("weights") or trained.weights or "int8"
    return replace(trained if trained.weights == weights else QuantizeConfig(weights), **given)


def table(rows: list[Row]) -> str:
    """What each kind of parameter is in, and takes, as text."""
    total = Row("all", *(sum(row[i] for row in rows) if i != 2 else "" for i in range(1, 5)), ())
    lines = [("", "parameters", "bfloat16", "quantised", "")]
    for row in (*rows, total):
        names = ", ".join(row.names[:6]) + (", ..." if len(row.names) > 6 else "")
        note = f"{row.dtype}{', a scale for each output' if row.dtype in quantize.TYPES else ''}"
        note += f": {names}" if names else ""
        lines.append((row.what, f"{row.parameters:,}", _size(row.before), _size(row.bytes), note))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join(
        f"{line[0]:<{widths[0]}}  " + "  ".join(f"{line[i]:>{widths[i]}}" for i in (1, 2, 3)) + f"  {line[4]}".rstrip()
        for line in lines
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.3f} MB"


def _check_target(target: Path) -> None:
    storage.check(target, "OUT", write=True)
    require(not storage.names(target) and not target.is_file(), f"{target} is not empty: choose a new folder")


def _write(target: Path, config: Config, params: dict, step: int, data: DataConfig, identity: str | None) -> None:
    """data: whose tokenizer is copied."""
    with RunFolder(config) as folder:
        folder.write_config()
        storage.write_text(target / TABLE, table(quantize.sizes(config.model, config.quantize)) + "\n")
        keep_tokenizer(data, target)
        checkpoints = Checkpoints(folder.checkpoints, keep=1)
        try:
            record = {} if identity is None else {IDENTITY: identity}
            checkpoints.save(step, {"params": quantize.as_dicts(params)}, to_dict(config), record)
            jax.block_until_ready(params)
        finally:
            checkpoints.close()
