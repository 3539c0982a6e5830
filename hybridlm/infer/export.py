# SPDX-License-Identifier: Apache-2.0
"""A model's prefill and decode steps as StableHLO (`jax.export`), to be run where none of this project is installed.

A folder holds three programs for each platform, the weights as safetensors, and `manifest.json`, which names every
array:

    cache = start(weights, lengths_B)
    logits_BV, token_B, cache = prefill(weights, cache, tokens_BT, lengths_B)
    logits_BV, token_B, cache = decode(weights, cache, token_B)

Weights and cache are arguments, flat dicts of arrays. What programs hold, how rows are read and what is refused stands
in docs/stablehlo.md.

Axis letters: B batch, T tokens of a piece, D model, V vocabulary.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

import hybridlm
from hybridlm import storage
from hybridlm.data.as_files import files_of
from hybridlm.data.tokenizer import FileTokenizer, Tokenizer
from hybridlm.errors import ConfigError, cut, require
from hybridlm.fields import WHOLE
from hybridlm.hf.swap import CannotSwap, replaced
from hybridlm.hf.tensors import Source, write_tensors
from hybridlm.infer.steps import Steps, stored
from hybridlm.infer.target import Target, targets
from hybridlm.layers.cache import AS_COMPUTED, CacheTypes
from hybridlm.model.decoding import Writer
from hybridlm.model.model import HybridLM
from pallas_kernels.op import choices

PIECE = 512
"""Tokens of a prompt that are read at once, where nothing is said and the context has as many."""
MAX_SHARD_BYTES = 5_000_000_000
MANIFEST, EXAMPLE, TOKENIZER = "manifest.json", "run.py", "tokenizer.json"
FORMAT = 1
"""Of the manifest: changes when what reads it has to."""


@dataclass(frozen=True)
class Program:
    """One step of a model for one platform."""

    step: str
    target: Target
    content: bytes
    """As `jax.export.deserialize` takes it."""
    version: int
    """Of JAX's calling convention."""
    chosen: tuple[str, ...]
    """Which implementation each op was given, and why."""

    @property
    def file(self) -> str:
        """Its name in the folder."""
        return f"{self.step}.{self.target.name.replace(':', '-')}.jax_export"


def export(
    model: HybridLM,
    folder: str | os.PathLike[str],
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    *,
    context: int,
    batch: int | None = None,
    prefill: int | None = None,
    cache_types: CacheTypes = AS_COMPUTED,
    tokenizer: Tokenizer | None = None,
    source: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes a new folder with the model's steps, weights and manifest, and gives the manifest.

    Args:
      folder: a new or empty one, on a disk or in a bucket.
      platforms: "cpu", "cuda", "tpu": programs of XLA's operations alone, for any such device; "cuda:9.0" and
        "tpu:v5e" (v5p, v6e, ...): with the kernels that `auto` takes on it.
      context: tokens that a row can have, prompt and answer together.
      batch: rows; None: any number, decided when the program is called.
      prefill: tokens of a prompt that are read at once; None: PIECE, or the context where that is shorter.
      cache_types: how caches are stored.
      tokenizer: is written beside the programs where it is a file, or bytes.
      source: what the manifest calls the model.
      progress: called with (name, bytes written, bytes of all) after each array of weights.

    Raises ConfigError, one line, for numbers out of range, platforms that are not known, a folder that is not empty, a
    bidirectional model, a program that cannot be written for any number of rows, and where flatbuffers is missing; the
    folder is then as it was. OSError where it cannot be written.
    """
    folder, wanted = storage.as_path(folder), targets(platforms)
    ahead = model.config.sees_ahead
    require(not ahead, f"the model cannot be decoded token by token: {ahead}")
    prefill = piece(context, batch, prefill, WHOLE - model.config.prefix_tokens)
    check_folder(folder)
    graphdef, params = Writer(model).prepared
    steps = Steps(graphdef, params, context, cache_types)
    programs = [program for target in wanted for program in lowered(steps, target, batch, prefill)]
    arrays = dict(zip(steps.weights, jax.tree.leaves(params), strict=True))
    sources = [_source(name, array) for name, array in arrays.items()]
    texts = _tokenizer_files(tokenizer)
    manifest = _manifest(steps, programs, batch, prefill, tokenizer if texts else None, source)
    texts[EXAMPLE] = Path(__file__).with_name("run_exported.py").read_text(encoding="utf-8")
    texts[MANIFEST] = json.dumps(manifest, indent=1) + "\n"

    def write(into: Path) -> None:
        write_tensors(into, sources, MAX_SHARD_BYTES, progress)
        for program in programs:
            storage.write_bytes(into / program.file, program.content)
        for name, text in texts.items():  # the manifest last of all: without it, the folder is no export
            storage.write_text(into / name, text)

    _write(folder, write)
    return manifest


def piece(context: int, batch: int | None, prefill: int | None, most: int = WHOLE) -> int:
    """Tokens of a prompt that are read at once. most: tokens that a row can have. ConfigError for what is out of range,
    as of `export`."""
    require(1 <= context <= most, f"context ({context}) must be between 1 and {most}")
    require(batch is None or 1 <= batch <= WHOLE, f"batch ({batch}) must be any, or between 1 and {WHOLE}")
    prefill = min(PIECE, context) if prefill is None else prefill
    require(1 <= prefill <= context, f"prefill ({prefill}) must be between 1 and context ({context})")
    return prefill


def check_folder(folder: Path) -> None:
    """ConfigError where nothing can be written there, or something is there already."""
    require(find_spec("flatbuffers") is not None, "programs are written by flatbuffers: pip install 'hybridlm[export]'")
    storage.check(folder, "OUT", write=True)
    taken = folder.is_file() or bool(storage.names(folder))
    require(not taken, f"OUT ({folder}) is there and not empty: choose a new folder")


def lowered(steps: Steps, target: Target, batch: int | None, prefill: int) -> Iterator[Program]:
    """The steps as programs for a platform. batch: None: any number of rows."""
    rows: Any = jax_export.symbolic_shape("batch")[0] if batch is None else batch
    for step, (function, args) in steps.calls(rows, prefill).items():
        try:
            with choices() as chosen, target.assumed():
                program = jax_export.export(jax.jit(function, keep_unused=True), platforms=[target.platform])(*args)
        except Exception as error:
            if batch is not None and not isinstance(error, NotImplementedError):
                raise
            why = cut(" ".join(str(error).split()) or type(error).__name__, 200)
            of_any = "" if batch is not None else " and any number of rows: give batch as a number"
            raise ConfigError(f"{step} cannot be a program for {target.name}{of_any} ({why})") from error
        require(program.nr_devices == 1, f"{step} would be for {program.nr_devices} devices: leave the mesh first")
        content = bytes(program.serialize())
        yield Program(step, target, content, program.calling_convention_version, tuple(sorted(chosen)))


def _manifest(
    steps: Steps, programs: list[Program], batch: int | None, prefill: int, tokenizer: Tokenizer | None, source: str
) -> dict[str, Any]:
    """What the folder says of itself."""
    config, by_target = steps.config, dict[str, dict[str, str]]()
    for program in programs:
        by_target.setdefault(program.target.name, {})[program.step] = program.file
    chosen = {
        name: sorted({line for program in programs if program.target.name == name for line in program.chosen})
        for name in by_target
    }
    return {
        "format": FORMAT,
        "made_by": {"hybridlm": hybridlm.__version__, "jax": jax.__version__},
        "calling_convention": max(program.version for program in programs),
        "model": source,
        "pattern": config.pattern,
        "vocab_size": config.vocab_size,
        "compute_dtype": config.compute_dtype,
        "context": steps.context,
        "prefill": prefill,
        "batch": batch,
        "cache_types": asdict(steps.types),
        "tokenizer": None if tokenizer is None else TOKENIZER,
        "bos_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_id": None if tokenizer is None else tokenizer.eos_id,
        "programs": by_target,
        "implementations": chosen,
        "cache": steps.describe_cache(batch),
        "weights": steps.describe_weights(),
    }


def _source(name: str, array: jax.Array) -> Source:
    """A weight as it is written."""
    kind = stored(np.dtype(array.dtype))
    return Source(name, array.shape, kind, lambda: np.asarray(array).view(kind))


def _tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, str]:
    """tokenizer.json by its name; {} where there is none."""
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, FileTokenizer):
        return {TOKENIZER: storage.read_bytes(tokenizer.path).decode()}
    files: Mapping[str, str] = files_of(tokenizer)
    return {name: text for name, text in files.items() if name == TOKENIZER}


def _write(folder: Path, write: Callable[[Path], None]) -> None:
    """Has `write(folder)` fill a folder that appears when it is whole; where that cannot be, as in a bucket, the
    manifest comes last."""
    if storage.in_bucket(folder):
        write(folder)
        return
    try:
        with replaced(folder, lambda _: False) as beside:
            write(beside)
    except CannotSwap:
        storage.make_folder(folder)
        write(folder)
