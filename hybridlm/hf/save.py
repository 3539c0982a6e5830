# SPDX-License-Identifier: Apache-2.0
"""A model as a published checkpoint: config.json, safetensors and the tokenizer's files."""

import errno
import uuid
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from hybridlm import storage
from hybridlm.errors import ConfigError, require
from hybridlm.hf.card import CARD, About, is_kept, license_of, model_card
from hybridlm.hf.checkpoint import Checkpoint, open_checkpoint
from hybridlm.hf.config_json import explained, find_family, save_json, write_values
from hybridlm.hf.families import family_of
from hybridlm.hf.family import Family
from hybridlm.hf.inside import check_file, files_like, has_file
from hybridlm.hf.keys import Keys
from hybridlm.hf.plan import Plan, Tensor, dotted, make_plan
from hybridlm.hf.swap import CannotSwap, replaced
from hybridlm.hf.tensors import DTYPES as STORED
from hybridlm.hf.tensors import INDEX, Source, shards_of, write_tensors
from hybridlm.layers.quantized import Quantized
from hybridlm.model.config import ModelConfig

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "*.model",
    "chat_template*", "generation_config.json", "tokenization_*.py",
)  # fmt: skip

OWN_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What a tokenizer of the model's own takes the place of, whether or not it has each."""


def to_hf(
    model,
    folder: str | Path,
    *,
    family: str | None = None,
    like: str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    about: About | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Writes what the published implementation loads with no missing and no unexpected key, into a folder or a bucket.

    A model that no published family can express is written in our own format, whose folder holds the model's code in
    plain PyTorch, too: transformers loads it with trust_remote_code=True. README.md is a model card; one that somebody
    else wrote there stays.

    family: model_type to write; None: that of `like`, else the first that can express the model, `hybridlm`, our own,
    last. like: a published
    checkpoint folder whose tokenizer files and other config.json keys are carried along; None: the one that the model
    was loaded from, if any. dtype: of the matrices and embeddings written; None: that of each tensor in `like`, without
    one that of the parameter. Norms, biases, convolutions and recurrence parameters are float32, except where `like`
    has them in another type that holds their values to the bit and no dtype is given. overwrite: replace what is in the
    folder under the names that are written. about: what the card says of the training, and the tokenizer of a model
    that comes from nowhere. progress: called with (name, bytes written, bytes of all) after each
    tensor.

    Tensors are made and written one at a time, beside the folder, which is replaced at once when all is there: see
    hybridlm.hf.swap, and `_write_in_place` for buckets. ConfigError, one line, where the family cannot express the
    model or files are in the way, OSError where it cannot be written; the folder is then as it was.
    """
    folder = storage.as_path(folder)
    require(dtype is None or dtype in DTYPES, f"dtype ({dtype!r}) must be one of {', '.join(DTYPES)}")
    require(max_shard_bytes > 0, f"max_shard_bytes ({max_shard_bytes}) must be positive")
    like = _like(model, like)
    of, (values, published) = _family(model.config, family, like)
    alike = like if like is not None and like.family is of else None
    plan = make_plan(of, model.config, published.pattern)
    params = {dotted(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    _check_here(params)
    about = About() if about is None else about
    texts = {**about.files, **of.code(model.config)}
    _check_target(folder, [None if like is None else like.folder, about.tokenizer], overwrite, texts)
    tensors = plan.tensors | {name: plan.tensors[plan.copies[name]] for name in sorted(plan.doubled)}
    same = like is not None and of.model_type in (like.family.model_type, like.family.written_as)
    kinds = _dtypes(tensors, plan, params, dtype, like if same else None)
    carried = {} if alike is None else _carried(alike)
    sources = {name: _source(name, tensor, params, kinds[name]) for name, tensor in tensors.items()}
    sources |= {} if alike is None else _as_cut_in(alike, plan, sources)
    sources |= _constants(of, published, alike)
    ends = carried.get("eos_token_id")
    if isinstance(ends, list) and ends[:1] == [values.get("eos_token_id")]:
        values = {**values, "eos_token_id": ends}  # of which a model may read the first
    config = {**carried, **about.ids, **values, "dtype": dtype or str(kinds[of.embedding])}
    if not is_kept(folder / CARD):
        n_params = sum(leaf.size for leaf in params.values())
        known = {
            "license": about.license or (None if like is None else license_of(like.folder)),
            "tokenizer": bool(about.tokenizer or about.files or (like and has_file(like.folder, "tokenizer.json"))),
        }
        texts[CARD] = model_card(folder.name, model.config, of, n_params, config["dtype"], about, **known)

    def write(into: Path, mark: str | None = None) -> None:
        write_tensors(into, sources.values(), max_shard_bytes, progress, mark)
        save_json(config, into / "config.json")
        if like is not None and storage.absolute(like.folder) != storage.absolute(folder):
            copy_tokenizer(like.folder, into, without=OWN_FILES if about.tokenizer or about.files else ())
        if about.tokenizer is not None:
            copy_tokenizer(about.tokenizer, into)
        for name, text in texts.items():
            storage.write_text(into / name, text)

    _write(folder, write)


def copy_tokenizer(source: Path, folder: Path, without: Collection[str] = ()) -> list[str]:
    """Copies the tokenizer's files but some, and says which. ConfigError for links and other things that are no
    files."""
    files = [file for file in files_like(source, *TOKENIZER_FILES) if file.name not in without]
    for file in files:
        storage.copy(file, folder / file.name)
    return [file.name for file in files]


def copy_small_files(source: Path, folder: Path) -> None:
    """Copies config.json and the tokenizer's files: what `like` needs."""
    storage.make_folder(folder)
    storage.copy(check_file(source / "config.json"), folder / "config.json")
    copy_tokenizer(source, folder)


def _like(model, like: str | Path | None) -> Checkpoint | None:
    """The checkpoint whose files and keys are carried along: the one named, else the one that the model came from."""
    source = model.source if like is None else like
    if source is None:
        return None
    if like is None and not (storage.as_path(source) / "config.json").is_file():
        raise ConfigError(f"the checkpoint that the model was loaded from ({source}) is gone: name one with like=")
    return open_checkpoint(source)


def _carried(like: Checkpoint) -> dict:
    keys = Keys(like.values)
    like.family.read(keys)
    return {key: value for key, value in keys.carried().items() if key not in ("torch_dtype", "transformers_version")}


def _is_tensors(name: str) -> bool:
    """Whether a file of a published folder holds tensors, or says where they are."""
    return name == INDEX or (name.startswith("model") and name.endswith(".safetensors"))


def _family(config: ModelConfig, name: str | None, like: Checkpoint | None) -> tuple[Family, tuple]:
    """The family that a model is written as, its config.json's values, and the config that they are read as."""
    if name is None and like is None:
        of = find_family(config)
        return of, write_values(of, config)
    of = family_of(name or like.family.model_type)
    of = of if of.written_as is None else family_of(of.written_as)
    try:
        return of, write_values(of, config)
    except ConfigError as error:
        raise explained(error, config, of) from None


def _check_target(folder: Path, sources: list[Path | None], overwrite: bool, texts: Iterable[str]) -> None:
    """ConfigError where the folder cannot be written, or files are in the way that are not to be replaced."""
    storage.check(folder, "FOLDER", write=True)
    require(not folder.exists() or folder.is_dir(), f"{folder} is a file, where a folder is to be written")
    there = storage.names(folder)
    old = [name for name in there if _is_tensors(name)]
    require(
        overwrite or not old,
        f"{folder} holds a checkpoint already ({', '.join(old[:3])}): overwrite it, or choose another",
    )
    new = {"config.json", *texts}
    for source in sources:
        if source is None or storage.absolute(source) == storage.absolute(folder):
            continue
        new |= {file.name for file in files_like(source, *TOKENIZER_FILES)}
    taken = sorted(new & set(there))
    require(overwrite or not taken, f"{folder} has {', '.join(taken[:3])} already: overwrite it, or choose another")


def _write(folder: Path, write: Callable) -> None:
    """Has `write(folder, mark)` write an export that takes the place of what is in the folder."""
    beside = folder
    try:
        if storage.in_bucket(folder):
            _write_in_place(folder, write)
            return
        try:
            with replaced(folder, _is_tensors) as beside:
                write(beside)
        except CannotSwap:
            storage.make_folder(folder)
            _write_in_place(folder, write)
    except OSError as error:
        file = str(error.filename or folder).replace(str(beside), str(folder))
        said = f"{error.strerror or error}; what was in {folder} is untouched"
        raise OSError(error.errno or errno.EIO, said, file) from error


def _write_in_place(folder: Path, write: Callable) -> None:
    """Where a folder cannot be replaced as a whole, the tensors get new names, the index is replaced by them at once,
    then config.json, and then the old tensors go. A stop between the first two of these leaves new tensors with the old
    config.json, which is that of the same model, or is refused as another one's; one before leaves the old export."""
    old = [name for name in storage.names(folder) if _is_tensors(name)]
    mark = uuid.uuid4().hex[:8] if old else None
    try:
        write(folder, mark)
    except BaseException:
        _take_back(folder, mark, old)
        raise
    if old:
        listed = {file.name for file in shards_of(folder)}
        for name in old:
            if name != INDEX and name not in listed:
                storage.remove(folder / name)


def _take_back(folder: Path, mark: str | None, old: list[str]) -> None:
    """Removes the new tensors, unless the index of the old ones was replaced already: then both stay."""
    new = [name for name in storage.names(folder) if mark and f"-{mark}-" in name]
    replaced_index = INDEX in old and any(file.name in new for file in shards_of(folder))
    for name in [] if replaced_index else new:
        storage.remove(folder / name)


def _check_here(params: dict) -> None:
    rounded = [path for path, leaf in params.items() if isinstance(leaf[...], Quantized)]
    require(not rounded, f"the model is quantised ({', '.join(rounded[:3])}): give the one that it was made of")
    far = [path for path, leaf in params.items() if not leaf[...].is_fully_addressable]
    require(not far, f"parameters of other processes cannot be written from here: {', '.join(far[:3])}")


def _dtypes(
    tensors: dict[str, Tensor], plan: Plan, params: dict, dtype: str | None, like: Checkpoint | None
) -> dict[str, np.dtype]:
    """The type in which each tensor is written: see to_hf."""
    float32, named, stored = DTYPES["float32"], dtype, {}
    if dtype is None and like is not None:
        named = like.dtype
        if any(like.folder.glob("*.safetensors")):
            known = lambda name: like.family.canonical(name, plan.tensors)
            stored = {known(name): STORED.get(entry.dtype) for name, entry in like.entries.items()}

    def of(name: str, tensor: Tensor) -> np.dtype:
        exact = any(plan.is_float32(part.path) for part in tensor.pieces)
        if (kind := stored.get(name)) is not None:
            return kind if not exact or _holds(kind, _make(tensor, params, float32)) else float32
        own = {np.dtype(params[part.path][...].dtype) for part in tensor.pieces}
        return float32 if exact or len(own) > 1 else DTYPES.get(named, own.pop())

    return {name: of(name, tensor) for name, tensor in tensors.items()}


def _holds(dtype: np.dtype, values: np.ndarray) -> bool:
    """Whether a type holds float32 values to the bit."""
    return np.array_equal(values.astype(dtype).astype(np.float32), values, equal_nan=True)


def _source(name: str, tensor: Tensor, params: dict, dtype: np.dtype) -> Source:
    return Source(name, tensor.shape, dtype, partial(_make, tensor, params, dtype))


def _as_cut_in(like: Checkpoint, plan: Plan, sources: dict[str, Source]) -> dict[str, Source]:
    """Sources of tensors whose rows are cut elsewhere in the checkpoint `like`, cut as there."""
    if not plan.family.recut or not any(like.folder.glob("*.safetensors")):
        return {}
    there, changed = {plan.canonical(name): entry for name, entry in like.entries.items()}, {}
    for names in plan.recut():
        if not all(name in there for name in names):
            continue
        shapes, ours = [there[name].shape for name in names], [sources[name] for name in names]
        if sum(shape[0] for shape in shapes) != sum(source.shape[0] for source in ours):
            continue
        start = 0
        for source, shape in zip(ours, shapes, strict=True):
            make = partial(_cut, ours, slice(start, start + shape[0]))
            changed[source.name] = Source(source.name, (shape[0], *source.shape[1:]), source.dtype, make)
            start += shape[0]
    return changed


def _constants(of: Family, published: ModelConfig, like: Checkpoint | None) -> dict[str, Source]:
    """Tensors that follow from the config; those that the checkpoint `like` has as it has them."""
    there = {} if like is None or not any(like.folder.glob("*.safetensors")) else like.entries
    sources = {}
    for name, (shape, make, dtype) in of.constants(published).items():
        entry = there.get(name)
        same = entry is not None and entry.shape == shape and entry.dtype in STORED
        kind, make = (STORED[entry.dtype], entry.open) if same else (np.dtype(dtype), make)
        sources[name] = Source(name, shape, kind, make)
    return sources


def _cut(sources: list[Source], rows: slice) -> np.ndarray:
    """Rows of tensors that stand one behind the other."""
    return np.concatenate([source.make() for source in sources])[rows]


def _make(tensor: Tensor, params: dict, dtype: np.dtype) -> np.ndarray:
    """The published tensor, of the parts of parameters that it is made of."""
    out = np.empty(tensor.shape or (1,), dtype)
    here: dict[tuple, np.ndarray] = {}  # a tensor may be made of many parts of one parameter
    for rows, part in tensor.rows():
        array, index = params[part.path][...], part.index
        layer, index = (index[0], index[1:]) if index and isinstance(index[0], int) else (None, index)
        if (part.path, layer) not in here:  # a layer of a stacked parameter: it alone leaves its devices
            here[part.path, layer] = np.asarray(array if layer is None else _layer(array, layer))
        out[rows] = part.to_theirs(here[part.path, layer][index]).reshape(out[rows].shape)
    return out.reshape(tensor.shape)


@jax.jit
def _layer(array: jax.Array, i: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
