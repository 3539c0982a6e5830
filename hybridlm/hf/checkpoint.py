# SPDX-License-Identifier: Apache-2.0
"""A published checkpoint's folder, opened: what its config.json says and where its tensors are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hybridlm import storage
from hybridlm.errors import ConfigError, require
from hybridlm.hf.config_json import load_json, read_values
from hybridlm.hf.families import family_of
from hybridlm.hf.family import Family
from hybridlm.hf.inside import has_file
from hybridlm.hf.plan import Plan
from hybridlm.hf.tensors import DTYPES, Entry, Rows, read_entries, recut
from hybridlm.model.config import ModelConfig

BYTES = range(256, 513)
"""Sizes of vocabularies that are taken for those of bytes: 256, special tokens, padding."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder as `open_checkpoint` finds it; headers of its files are read when they are first asked for, once."""

    folder: Path
    values: Mapping[str, Any]
    """config.json."""
    family: Family
    stated: ModelConfig
    """Our config of config.json alone."""

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The tensors by their names in the files. ConfigError for files that are missing or damaged."""
        return read_entries(self.folder)

    @cached_property
    def config(self) -> ModelConfig:
        """The model's config: tied only where the tensors are, as the published implementation reads it."""
        if not self.stated.tie_embeddings:
            return self.stated
        names = (self.family.output, self.family.embedding)
        known = {self.family.canonical(name, names): entry for name, entry in self.entries.items()}
        output, embedding = (known.get(name) for name in names)
        tied = output is None or embedding is None or output.equals(embedding)
        return replace(self.stated, tie_embeddings=tied)

    @property
    def dtype(self) -> str:
        """Type of the weights by config.json."""
        said = {**(self.values.get("text_config") or {}), **self.values}
        return str(said.get("dtype") or said.get("torch_dtype") or "float32")

    def matched(self, plan: Plan) -> dict[str, Entry | Rows]:
        """The tensors by their names in the plan; ConfigError that names all that do not fit."""
        problems = {"missing": [], "unknown": [], "misshapen": [], "unequal": []}
        found, again = {}, {}
        for name, entry in self.entries.items():
            known = plan.canonical(name)
            if known in plan.tensors:
                found[known] = entry
            elif known in plan.copies:
                again[known] = entry
            elif not plan.skips(known):
                problems["unknown"].append(name)
        for name, original in plan.copies.items():
            if name in again and original not in found:
                found[original] = again.pop(name)
        for names in plan.recut():
            if all(name in found for name in names):
                there, shapes = [found[name] for name in names], [plan.tensors[name].shape for name in names]
                found |= zip(names, recut(there, shapes), strict=True)
        entries = {}
        for name, tensor in plan.tensors.items():
            entry = found.get(name)
            if entry is None:
                problems["missing"].append(name)
            elif entry.dtype not in DTYPES:
                problems["misshapen"].append(f"{name} of type {entry.dtype} where {' or '.join(DTYPES)} is wanted")
            elif entry.shape != tensor.shape:
                problems["misshapen"].append(f"{name} {list(entry.shape)} where {list(tensor.shape)} is wanted")
            else:
                entries[name] = entry
        for name, entry in again.items():
            original = plan.copies[name]
            of_output = name == self.family.output  # see `config`
            if not of_output and original in entries and not entry.equals(entries[original]):
                problems["unequal"].append(f"{name} to {original}, which it shares")
        _refuse(self.folder, problems)
        return entries


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """The checkpoint of a folder, also in a bucket, with config.json and safetensors. ConfigError names what is not
    supported."""
    folder = storage.as_path(folder)
    storage.check(folder, "the published checkpoint")
    file = folder / "config.json"
    values = load_json(file)
    is_run = "model_type" not in values and {"model", "data", "run"} <= set(values)
    require(not is_run, f"{folder} holds a run, not a published checkpoint: --run and --init.run take it")
    require("model_type" in values, f"{file}: model_type is missing")
    for name in ("dtype", "torch_dtype"):
        require(isinstance(values.get(name), str | None), f"{file}: {name} ({values.get(name)!r:.60}) must be a text")
    family = family_of(values["model_type"])
    return Checkpoint(folder, values, family, read_values(family, values, str(file)))


def tokenizer_of(folder: Path, config: ModelConfig) -> str:
    """What `data.tokenizer` is for a published checkpoint: its folder; without a tokenizer.json, byte where the
    vocabulary is that of bytes, else empty: to be given."""
    if has_file(folder, "tokenizer.json"):
        return str(folder)
    return "byte" if config.vocab_size in BYTES else ""


def _refuse(folder: Path, problems: Mapping[str, list[str]]) -> None:
    """ConfigError, one line, where there is a problem."""
    texts = [
        f"{len(names)} {what}: {', '.join(names[:20])}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        for what, names in problems.items()
        if names
    ]
    if texts:
        raise ConfigError(f"{folder} does not hold the tensors of its config.json: {'; '.join(texts)}")
