# SPDX-License-Identifier: Apache-2.0
"""A published checkpoint as a model: tensors go from the file to their devices one at a time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from hybridlm.errors import ConfigError, require
from hybridlm.hf.config_json import difference_of, published_dtype, read_config_json
from hybridlm.hf.family import Family
from hybridlm.hf.plan import OUTPUT, Plan, Tensor, make_plan
from hybridlm.hf.tensors import DTYPES, Entry, read_entries
from hybridlm.model.config import ModelConfig

COMPUTE = {"float32": "float32", "float64": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}
"""Type of a published checkpoint -> type of the activations."""


def from_hf(
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    compute_dtype: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
):
    """The model of a published checkpoint: a folder with config.json and safetensors, as `save_pretrained` writes it.

    mesh: parameters are made on its devices, sharded; None: on the first device. dtype: of matrices and embeddings
    (norms, biases and recurrence parameters stay float32). compute_dtype: of activations; None: float32 for a
    checkpoint of that type, else bfloat16. progress: called with (name, bytes read, bytes of all) after each tensor.

    Never more of the checkpoint is in memory than the model's own arrays and, on the way, one of its parameters.
    ConfigError, one line, for a family or an option that is not supported, and for unknown, missing or misshapen
    tensors, all of them named. A checkpoint whose config ties the output to the embedding and which holds two that
    differ is read as untied, as the published implementation reads it.
    """
    folder = Path(folder)
    family, config, values = read_model(folder)
    config = replace(config, compute_dtype=compute_dtype or COMPUTE.get(published_dtype(values), "bfloat16"))
    abstract = abstract_model(config)
    model = load_into(folder, make_plan(family, abstract, config), abstract, mesh, dtype, progress)
    model.source = str(folder)
    return model


def read_model(folder: Path) -> tuple[Family, ModelConfig, dict]:
    """(family, config, config.json's values) of a folder's model, tied only where its tensors are."""
    family, config, values = read_config_json(folder)
    tied = config.tie_embeddings and not _differ(folder, family, config)
    return family, replace(config, tie_embeddings=tied), values


def load_params(folder: Path, config: ModelConfig, mesh: Mesh) -> dict:
    """The parameters, as a nested dict, of a folder whose checkpoint has to be of this config's model."""
    family, published, _ = read_model(folder)
    difference = difference_of(config, published)
    require(difference is None, f"{folder} holds another model: {difference}")
    abstract = abstract_model(config)
    model = load_into(folder, make_plan(family, abstract, published), abstract, mesh, "float32")
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def abstract_model(config: ModelConfig):
    """The model without its values."""
    from hybridlm.model.init import abstract

    return abstract(config).model()


def load_into(folder: Path, plan: Plan, abstract, mesh: Mesh | None, dtype: str, progress=None):
    """The abstract model with the values of the folder's tensors; see from_hf."""
    from hybridlm.model.init import check_model
    from hybridlm.sharding import param_shardings

    require(dtype in ("float32", "bfloat16"), f"dtype ({dtype!r}) must be float32 or bfloat16")
    entries = _matched(folder, plan)
    if mesh is not None:
        check_model(abstract.config, mesh)
    else:
        here = SingleDeviceSharding(jax.local_devices()[0])
    fill = _Fill(plan, entries, progress)
    graphdef, state = nnx.split(abstract)
    values = []
    for path, leaf in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        info = plan.infos[name]
        sharding = here if mesh is None else param_shardings(info, mesh)
        kind = jnp.dtype(dtype) if info.kind in ("matrix", "embedding") else jnp.dtype(jnp.float32)
        values.append((path, leaf.replace(fill.parameter(name, sharding, kind))))
    return nnx.merge(graphdef, nnx.from_flat_state(values))


class _Fill:
    """Makes parameters of the tensors in files."""

    def __init__(self, plan: Plan, entries: dict[str, Entry], progress):
        self.plan, self.entries, self.progress = plan, entries, progress
        self.done, self.total = 0, sum(_n_bytes(entry) for entry in entries.values())
        self.sources: dict[str, list[tuple[Tensor, slice, object]]] = {}
        for tensor in plan.tensors.values():
            for rows, part in tensor.rows():
                self.sources.setdefault(part.path, []).append((tensor, rows, part))

    def parameter(self, path: str, sharding, dtype) -> jax.Array:
        """The whole parameter; each shard is put on its device before the next is made, equal shards once."""
        shape = self.plan.infos[path].shape
        made: dict[tuple, jax.Array] = {}
        arrays = []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            key = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
            if key not in made:
                made[key] = jax.device_put(self._shard(path, key, dtype), device)
            arrays.append(jax.device_put(made[key], device))
        for tensor, rows, _ in self.sources[path]:
            if self.progress is not None:
                self.done += (
                    _n_bytes(self.entries[tensor.name]) * (rows.stop - rows.start) // max(1, (*tensor.shape, 1)[0])
                )
                self.progress(tensor.name, self.done, self.total)
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def _shard(self, path: str, bounds: tuple[tuple[int, int], ...], dtype) -> np.ndarray:
        """The part of a parameter within `bounds`, (start, stop) of each axis."""
        buffer = np.empty([stop - start for start, stop in bounds], dtype)
        for tensor, rows, part in self.sources[path]:
            target, wanted = [], []
            for at, (start, stop) in zip(part.index, bounds, strict=True):
                if isinstance(at, slice):
                    target.append(slice(None))
                    wanted.append(slice(start, stop))
                elif start <= at < stop:
                    target.append(at - start)
                else:
                    break
            else:
                whole = self.entries[tensor.name].open()
                ours = part.to_ours(whole[rows] if tensor.shape else whole.reshape(1))
                buffer[tuple(target)] = ours[tuple(wanted)]
        return buffer


def _matched(folder: Path, plan: Plan) -> dict[str, Entry]:
    """The folder's tensors by their names in the plan; ConfigError that names all that do not fit."""
    entries, problems = {}, {"missing": [], "unknown": [], "misshapen": [], "unequal": []}
    found, again = {}, {}
    for name, entry in read_entries(folder).items():
        known = plan.canonical(name)
        if known in plan.tensors:
            found[known] = entry
        elif known in plan.copies:
            again[known] = entry
        elif not plan.skipped(known):
            problems["unknown"].append(name)
    for name, original in plan.copies.items():
        if name in again and original not in found:
            found[original] = again.pop(name)
    for name, tensor in plan.tensors.items():
        if name not in found:
            problems["missing"].append(name)
        elif found[name].dtype not in DTYPES:
            problems["misshapen"].append(f"{name} of type {found[name].dtype} where {' or '.join(DTYPES)} is wanted")
        elif found[name].shape != tensor.shape:
            problems["misshapen"].append(f"{name} {list(found[name].shape)} where {list(tensor.shape)} is wanted")
        else:
            entries[name] = found[name]
    for name, entry in again.items():
        original = plan.copies[name]
        if original in entries and not _equal(entry, entries[original]):
            problems["unequal"].append(f"{name} to {original}, which it shares")
    texts = [
        f"{len(names)} {what}: {', '.join(names[:20])}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        for what, names in problems.items()
        if names
    ]
    if texts:
        raise ConfigError(f"{folder} does not hold the tensors of its config.json: {'; '.join(texts)}")
    return entries


def _differ(folder: Path, family: Family, config: ModelConfig) -> bool:
    """Whether a folder holds an output projection that is not its embedding."""
    plan = make_plan(family, abstract_model(config), config)
    known = {plan.canonical(name): entry for name, entry in read_entries(folder).items()}
    output, embedding = known.get(OUTPUT), known.get(plan.copies[OUTPUT])
    return output is not None and embedding is not None and not _equal(output, embedding)


def _equal(a: Entry, b: Entry) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.dtype in DTYPES and np.array_equal(a.open(), b.open())


def _n_bytes(entry: Entry) -> int:
    return int(np.prod(entry.shape, dtype=np.int64)) * DTYPES[entry.dtype].itemsize
