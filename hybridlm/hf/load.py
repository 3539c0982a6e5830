# SPDX-License-Identifier: Apache-2.0
"""A published checkpoint as a model: tensors go from the file to their devices one at a time."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, SingleDeviceSharding

from hybridlm.errors import require
from hybridlm.hf.axes import Piece
from hybridlm.hf.checkpoint import Checkpoint, open_checkpoint
from hybridlm.hf.compare import difference_of
from hybridlm.hf.plan import Plan, Tensor, dotted, make_plan
from hybridlm.hf.tensors import Entry, Rows
from hybridlm.model.config import ModelConfig
from hybridlm.model.init import abstract, check_model
from hybridlm.model.model import HybridLM
from hybridlm.sharding import param_shardings

COMPUTE = {"float32": "float32", "float64": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}
"""Type of a published checkpoint -> type of the activations."""
Progress = Callable[[str, int, int], None]


def from_hf(
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    compute_dtype: str | None = None,
    progress: Progress | None = None,
) -> HybridLM:
    """The model of a published checkpoint: a folder with config.json and safetensors, as `save_pretrained` writes it.

    folder: on this machine or in a bucket (s3://, gs://).

    mesh: parameters are made on its devices, sharded; None: on the first device. dtype: of matrices and embeddings
    (norms, biases, convolutions and recurrence parameters are always float32). compute_dtype: of activations; None:
    float32 for a checkpoint of that type, else bfloat16. progress: called with (name, bytes read, bytes of all) after
    each tensor.

    Never more of the checkpoint is in memory than the model's own arrays and, on the way, one of its parameters.
    ConfigError, one line, for a family or an option that is not supported, and for unknown, missing or misshapen
    tensors, all of them named. A checkpoint whose config ties the output to the embedding and which holds two that
    differ is read as untied, as the published implementation reads it.
    """
    checkpoint = open_checkpoint(folder)
    computed: Any = compute_dtype or COMPUTE.get(checkpoint.dtype, "bfloat16")
    config = replace(checkpoint.config, compute_dtype=computed)
    params = read_params(checkpoint, config, mesh, dtype, progress)
    model = nnx.merge(abstract(config).graphdef, params)
    model.source = str(folder)
    return model


def load_params(folder: Path, config: ModelConfig, mesh: Mesh) -> dict:
    """The parameters, as a nested dict, of a folder whose checkpoint has to be of this config's model."""
    checkpoint = open_checkpoint(folder)
    difference = difference_of(config, checkpoint.config)
    require(difference is None, f"{folder} holds another model: {difference}")
    return read_params(checkpoint, config, mesh)


def read_params(
    checkpoint: Checkpoint,
    config: ModelConfig,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> dict:
    """The parameters, as a nested dict, of a config that says what the checkpoint's says; see from_hf."""
    require(dtype in ("float32", "bfloat16"), f"dtype ({dtype!r}) must be float32 or bfloat16")
    if mesh is not None:
        check_model(config, mesh)
    plan = make_plan(checkpoint.family, config, checkpoint.config.pattern)
    fill = _Fill(plan, checkpoint.matched(plan), progress)
    here = SingleDeviceSharding(jax.local_devices()[0])
    params = {}
    for path, info in flatten_dict(abstract(config).info).items():
        name = dotted(path)
        kind = jnp.dtype("float32" if plan.is_float32(name) else dtype)
        params[path] = fill.parameter(name, here if mesh is None else param_shardings(info, mesh), kind)
    return unflatten_dict(params)


class _Fill:
    """Makes parameters of the tensors in files."""

    def __init__(self, plan: Plan, entries: dict[str, Entry | Rows], progress: Progress | None):
        self.plan, self.entries, self.progress = plan, entries, progress
        self.done, self.total = 0, sum(entry.n_bytes for entry in entries.values())
        self.sources: dict[str, list[tuple[Tensor, slice, Piece]]] = {}
        for tensor in plan.tensors.values():
            for rows, part in tensor.rows():
                self.sources.setdefault(part.path, []).append((tensor, rows, part))

    def parameter(self, path: str, sharding, dtype) -> jax.Array:
        """The whole parameter; each shard is put on its device before the next is made, equal shards once."""
        shape = self.plan.infos[path].shape
        made: dict[tuple, jax.Array] = {}
        indices = sharding.addressable_devices_indices_map(shape)
        keys = [tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)) for index in indices.values()]
        # shards are cut from the same tensors, of which none is to be read twice
        read = functools.cache(self._rows) if len(set(keys)) > 1 else self._rows
        arrays = []
        for device, key in zip(indices, keys, strict=True):
            if key not in made:
                made[key] = jax.device_put(self._shard(path, key, dtype, read), device)
            arrays.append(jax.device_put(made[key], device))
        if self.progress is not None:
            self._report(path)
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def _report(self, path: str) -> None:
        """Tells of each tensor's rows that the parameter is made of."""
        for tensor, rows, _ in self.sources[path]:
            n_rows = max(1, (*tensor.shape, 1)[0])
            self.done += self.entries[tensor.name].n_bytes * (rows.stop - rows.start) // n_rows
            if self.progress is not None:
                self.progress(tensor.name, self.done, self.total)

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a published tensor."""
        return self.entries[name].open_rows(slice(start, stop))

    def _shard(self, path: str, bounds: tuple[tuple[int, int], ...], dtype, read: Callable) -> np.ndarray:
        """The part of a parameter within `bounds`, (start, stop) of each axis; read: as `_rows`."""
        buffer = np.empty([stop - start for start, stop in bounds], dtype)
        for tensor, rows, part in self.sources[path]:
            target: list[slice | int] = []
            wanted: list[slice | int] = []
            for at, (start, stop) in zip(part.index, bounds, strict=True):
                if isinstance(at, slice):
                    first = at.start or 0
                    low, high = max(start, first), stop if at.stop is None else min(stop, at.stop)
                    if low >= high:
                        break
                    target.append(slice(low - start, high - start))
                    wanted.append(slice(low - first, high - first))
                elif start <= at < stop:
                    target.append(at - start)
                else:
                    break
            else:
                ours = part.to_ours(read(tensor.name, rows.start, rows.stop))
                buffer[tuple(target)] = ours[tuple(wanted)]
        return buffer
