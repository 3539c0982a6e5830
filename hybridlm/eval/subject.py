# SPDX-License-Identifier: Apache-2.0
"""What is evaluated: the model of a run's checkpoint or of a published folder, on the devices that there are."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from hybridlm import storage
from hybridlm.config import Config, DataConfig, InitConfig, MeshConfig
from hybridlm.config.mesh import check_config
from hybridlm.config.overrides import override
from hybridlm.data import load_tokenizer
from hybridlm.data.tokenizer import BUILT_IN, Tokenizer
from hybridlm.errors import ConfigError, require
from hybridlm.hf.checkpoint import open_checkpoint, tokenizer_of
from hybridlm.hf.load import COMPUTE, from_hf
from hybridlm.model.model import HybridLM
from hybridlm.model.quantize import of_run
from hybridlm.sharding import RULES, make_mesh, param_shardings
from hybridlm.train.init_run import is_otherwise
from hybridlm.train.run_folder import stored_config
from hybridlm.train.sample import load_model
from hybridlm.train.tokenizer_copy import IDENTITY, check_tokenizer, kept_tokenizer

BATCH = 8
"""Rows of a batch of a published model, at PUBLISHED_LENGTH tokens."""
PUBLISHED_LENGTH = 4096
"""Tokens of a row of a published model, unless that is asked for."""


@dataclass(frozen=True)
class Subject:
    """A model with all that evaluating it needs."""

    name: str
    """Folder that it is of."""
    step: int | None
    """That of a run's checkpoint; None: a published model."""
    config: Config
    """A run's, or one around a published model: its data says what rows are, its mesh how devices are arranged."""
    model: HybridLM
    """Its parameters lie on the mesh."""
    tokenizer: Tokenizer
    mesh: Mesh
    bos: bool
    """Whether a text begins with the tokenizer's bos: as in training, or as the published tokenizer has it."""


def open_run(
    folder: str | Path, step: int | None = None, words: Sequence[str] = (), own: Config | None = None
) -> Subject:
    """The model of a run's newest checkpoint, or of one step, and the run's config with words of the command line.

    words: of `data`, `mesh`, and what of the model has no parameters: `model.compute_dtype`, rope, window and scale of
    a block; the mesh is all devices side by side unless they say otherwise. own: a config whose own classes the run may
    have used. Raises ConfigError, one line, for what cannot be.
    """
    folder = storage.as_path(folder)
    storage.check(folder, "the run's folder")
    stored = stored_config(folder, own)
    rows = stored.data.batch_size // stored.optim.accumulate
    config = replace(
        stored, init=InitConfig(), mesh=MeshConfig(), run=replace(stored.run, sample_tokens=0),
        optim=replace(stored.optim, accumulate=1), data=replace(stored.data, batch_size=rows),
    )  # fmt: skip
    config, mesh = _arranged(config, words)
    with jax.set_mesh(mesh):
        loaded, _, record, step = load_model(folder, step, own)
    identity = record.get(IDENTITY)
    if "data.tokenizer" in _keys(words):
        tokenizer = check_tokenizer(config.data, identity, folder)
    else:
        tokenizer = kept_tokenizer(config.data, folder, identity)
    _check_vocabulary(config, tokenizer)
    model = _placed(config, nnx.to_pure_dict(nnx.state(loaded, nnx.Param)), mesh)
    return Subject(str(folder), step, config, model, tokenizer, mesh, bos=tokenizer.bos_id is not None)


def open_published(folder: str | Path, words: Sequence[str] = ()) -> Subject:
    """The model of a folder with config.json and safetensors; words and errors as of `open_run`.

    Rows hold whole documents (data.packing=best_fit) unless the words say otherwise.
    """
    folder = storage.as_path(folder)
    checkpoint = open_checkpoint(folder)
    published = checkpoint.config
    ahead = published.sees_ahead
    require(
        not ahead, f"{folder}: a published folder does not say what a model that sees ahead was trained for ({ahead})"
    )
    model = replace(published, compute_dtype=COMPUTE.get(checkpoint.dtype, "bfloat16"))
    data = DataConfig(
        tokenizer=tokenizer_of(folder, published), packing="best_fit", seq_len=PUBLISHED_LENGTH, batch_size=BATCH
    )
    config, mesh = _arranged(Config(name=folder.name, model=model, data=data), words)
    tokenizer = load_tokenizer(config.data.tokenizer, bos=config.data.bos_token, eos=config.data.eos_token)
    _check_vocabulary(config, tokenizer)
    compute = config.model.compute_dtype
    dtype = "bfloat16" if compute == checkpoint.dtype == "bfloat16" else "float32"
    loaded = from_hf(folder, mesh=mesh, dtype=dtype, compute_dtype=compute)
    if config.model != replace(model, compute_dtype=compute):  # rope, window or scale are others than published
        loaded = _placed(config, nnx.to_pure_dict(nnx.state(loaded, nnx.Param)), mesh)
    return Subject(str(folder), None, config, loaded, tokenizer, mesh, bos=_adds_bos(config.data.tokenizer, tokenizer))


def _arranged(config: Config, words: Sequence[str]) -> tuple[Config, Mesh]:
    """The config with the words, and its mesh; rows that nobody asked for are as many as the devices divide."""
    keys = _keys(words)
    for key in keys:
        fits = key.startswith(("data.", "mesh.")) or is_otherwise(key)
        require(
            fits,
            f"--{key} is no option of an evaluation: --data.KEY, --mesh.KEY and --model.compute_dtype are, and rope, "
            "window and scale of a block, as --model.blocks.*.rope.scaling=YaRN",
        )
    before, config = config, override(config, words)
    mesh = make_mesh(config.mesh)
    if "data.batch_size" not in keys:
        n = math.prod(mesh.shape[axis] for axis in RULES["batch"])
        tokens = before.data.batch_size * before.data.seq_len
        rows = -(-max(tokens // config.data.seq_len, 1) // n) * n
        config = replace(config, data=replace(config.data, batch_size=rows))
    check_config(config, mesh)
    return config, mesh


def _keys(words: Sequence[str]) -> list[str]:
    """What is set, of words that each are `--key=value`, or `--key` with values behind it."""
    return [word[2:].partition("=")[0] for word in words if word.startswith("--")]


def _check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    require(
        tokenizer.vocab_size <= config.model.vocab_size,
        f"data.tokenizer {tokenizer.name} has a vocabulary of {tokenizer.vocab_size} tokens, the model one of "
        f"{config.model.vocab_size}: give --data.tokenizer=PATH of its own",
    )


def _placed(config: Config, params: dict, mesh: Mesh) -> HybridLM:
    graphdef, _, info = of_run(config.model, config.quantize)
    return nnx.merge(graphdef, jax.device_put(params, param_shardings(info, mesh)))


def _adds_bos(spec: str, tokenizer: Tokenizer) -> bool:
    """Whether a published tokenizer puts its bos before a text by itself: tokenizer_config.json says so, or the
    template of special tokens in tokenizer.json."""
    if tokenizer.bos_id is None or spec in BUILT_IN:
        return tokenizer.bos_id is not None
    path = storage.as_path(spec)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        beside = file.with_name("tokenizer_config.json")
        said = json.loads(storage.read_bytes(beside)).get("add_bos_token") if storage.exists(beside) else None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{beside} is not readable JSON: {error}") from error
    if isinstance(said, bool):
        return said
    from tokenizers import Tokenizer as Backend

    template = Backend.from_str(storage.read_bytes(file).decode()).encode("")
    return tokenizer.bos_id in template.ids[:1]
