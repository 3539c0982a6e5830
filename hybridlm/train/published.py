# SPDX-License-Identifier: Apache-2.0
"""A published checkpoint as the folder of a run, and a run as a published checkpoint."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flax import nnx

from hybridlm import storage
from hybridlm.config import Config, DataConfig, InitConfig, RunConfig
from hybridlm.config.tree import to_dict
from hybridlm.data import load_tokenizer
from hybridlm.errors import require
from hybridlm.hf import from_hf, to_hf
from hybridlm.hf.checkpoint import tokenizer_of
from hybridlm.hf.save import copy_small_files
from hybridlm.model.model import HybridLM
from hybridlm.train.about import about_run
from hybridlm.train.checkpoint import Checkpoints, finished_steps
from hybridlm.train.run_folder import CONVERTING, RunFolder, stored_config
from hybridlm.train.sample import load_model
from hybridlm.train.tokenizer_copy import IDENTITY, keep_tokenizer, kept_tokenizer

LEFT = ("published", "tokenizer")
"""Folders of which a call that was killed may have left files, of another source perhaps."""
Progress = Callable[[str, int, int], None]
"""Called with (what, bytes done, bytes in all) as from_hf and to_hf call it."""


def run_from_published(
    source: Path, target: Path, progress: Progress | None = None, tokenizer: str | None = None
) -> tuple[HybridLM, str]:
    """Makes a run's folder with one checkpoint, of step 0, that holds the parameters alone; gives the model and what
    its tokenizer is, as `data.tokenizer` says it.

    tokenizer: the same; None: the one in the source, or to be given. What an earlier call that was killed has left in
    the target is made anew. ConfigError where anything else is there or the source cannot be read.
    """
    storage.check(target, "RUN", write=True)
    require(_is_free(target) and not target.is_file(), f"{target} is not empty: choose a new folder")
    model = from_hf(source, progress=progress)
    told = tokenizer_of(source, model.config) if tokenizer is None else tokenizer
    if told == str(source):
        told = str(storage.absolute(target / "published"))
        load_tokenizer(str(source))
    elif told:
        load_tokenizer(told)
    data = replace(DataConfig(), tokenizer=told)
    source = storage.absolute(source)
    init, run = InitConfig(str(source)), RunConfig(dir=str(target))
    config = Config(name=source.name, model=model.config, init=init, data=data, run=run)
    with RunFolder(config) as folder:
        require(
            _is_free(target), f"{target} is not empty: choose a new folder"
        )  # another call may have ended meanwhile
        storage.write_text(target / CONVERTING, f"{source}\n")
        for left in (target / name / file for name in LEFT for file in storage.names(target / name)):
            storage.remove(left)
        folder.write_config()
        copy_small_files(source, folder.published)
        identity = {IDENTITY: kept_tokenizer(data, target, None).fingerprint} if told else {}
        keep_tokenizer(data, target)
        checkpoints = Checkpoints(folder.checkpoints, keep=1)
        try:
            params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
            checkpoints.save(0, {"params": params}, to_dict(config), identity)
        finally:
            checkpoints.close()
        storage.remove(target / CONVERTING)
    return model, told


def _is_free(target: Path) -> bool:
    """Whether nothing is there but what a call that was killed has left: its mark, and no checkpoint, which is written
    last and whole."""
    names = set(storage.names(target))
    return names <= {"lock"} or (CONVERTING in names and not finished_steps(target / "checkpoints"))


def publish_run(
    source: Path,
    target: Path,
    *,
    step: int | None = None,
    family: str | None = None,
    like: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    own: Config | None = None,
    progress: Progress | None = None,
) -> tuple[HybridLM, int]:
    """Writes the model of a run's checkpoint (the newest, or that of a step) for others; gives it and its step.

    The folder gets a model card of what the run's folder says, and the run's tokenizer.

    like: published checkpoint whose other files and keys are kept; None: the one that the run came from, or what the
    run kept of it, if any. own: a config whose own classes the run may have used; see from_dict. The rest as to_hf
    takes it.
    """
    stored = stored_config(source, own)
    require(
        not stored.quantize.stored,
        f"{source} holds a quantised model, which no published family has: convert the run that it was made of",
    )
    if like is None:
        origin = stored.init.hf
        folders = [*([storage.as_path(origin)] if origin else []), source / "published"]
        like = next((folder for folder in folders if storage.exists(folder / "config.json")), None)
    model, config, record, step = load_model(source, step, own)
    about = about_run(source, config, step, record, like)
    to_hf(model, target, family=family, like=like, dtype=dtype, overwrite=overwrite, about=about, progress=progress)
    return model, step
