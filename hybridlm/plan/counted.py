# SPDX-License-Identifier: Apache-2.0
"""The first stage of a plan: what is known of a run on devices without tracing anything. Bytes are of one device."""

import math
from collections import defaultdict
from dataclasses import dataclass

import jax

from hybridlm.config import Config
from hybridlm.config.mesh import check_config, repeated
from hybridlm.model.config import ModelConfig
from hybridlm.model.flops import train_flops
from hybridlm.model.pattern import spots
from hybridlm.plan.costs import WIDTH
from hybridlm.plan.slices import Devices
from hybridlm.sharding import RULES, make_mesh
from hybridlm.train.batches import held_rows
from hybridlm.train.layout import unrolled
from hybridlm.train.step import HOST, make_program

SHOWN = 1 << 20
"""Bytes from which on an array that every device keeps whole is worth a line."""


@dataclass(frozen=True)
class Counted:
    """What a run is, by its config and the mesh alone."""

    devices: int
    hosts: int
    mesh: dict[str, int]
    """Axes of more than one device."""
    parameters: int
    """Of the model, in all."""
    state: dict[str, int]
    """Bytes of parameters, optimizer and all else of the train state, as shapes and types have them: the arguments of
    the step beside the batch. TPUs pad some of them to tiles. Of a run with adapters these are the parameters, and what
    they belong to is the base."""
    replicated: dict[str, int]
    """Arrays of the train state that every device keeps whole although there are several: bytes of those of a
    mebibyte and more, by name."""
    whole: int
    """Bytes of all such arrays."""
    repeated: str | None
    """What is whole because `tensor` does not divide it, in words."""
    rows: int
    """Of a batch."""
    rows_of_host: tuple[int, int]
    """Fewest and most rows that a host reads."""
    readers: int
    """Hosts that read the same row, at most."""
    tokens: int
    """Of a step."""
    microbatches: int
    tokens_of_device: int
    """Of a microbatch, as the residual stream between sublayers has them."""
    depth: int
    """Sublayers that are run."""
    compiled: int
    """Of them compiled: the others are repeats of a loop."""
    model_flops: float
    """Of a device and a step: multiply-adds of matrix products that the maths asks for, two each."""
    gradients: int
    """Bytes of the gradients of all parameters, or of the adapters, before the update: float32 sums with microbatches,
    else in the type of activations."""
    inputs: int
    """Bytes of the inputs of sublayers of a microbatch that every remat policy keeps at once: of all, or with
    `model.remat_span` of the first of each span and of one span's others."""
    memory: int | None
    """Bytes that the device has; None: not known."""

    @property
    def least(self) -> int:
        """Bytes without which no step goes."""
        return sum(self.state.values()) + self.gradients + self.inputs


def count(config: Config, devices: Devices) -> Counted:
    """ConfigError where the mesh does not fit the devices, or the config the mesh."""
    places = devices.described()
    mesh = make_mesh(config.mesh, places)
    check_config(config, mesh)
    program = make_program(config, mesh)
    like, data, model = program.state_like, config.data, unrolled(config.model, mesh)
    parts = {"parameters": like["params"], "optimizer": like["opt_state"]}
    if program.base.like is not None:
        parts["base"] = program.base.like
    parts["other"] = {name: value for name, value in like.items() if name not in ("params", "opt_state")}
    held = {name: [x for x in jax.tree.leaves(part) if x.sharding.memory_kind != HOST] for name, part in parts.items()}
    state = {name: sum(map(shard_bytes, part)) for name, part in held.items()}
    local = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(like["params"]))
    width = WIDTH[config.model.compute_dtype]
    stream = data.batch_size // config.optim.accumulate * data.seq_len // _shards(mesh.shape, "batch", "stream")
    fewest, most, readers = _rows(program.batch_sharding, places, data.batch_size, data.seq_len)
    whole, peak = _replicated({**like, "base": program.base.like}) if mesh.size > 1 else {}, devices.peaks
    return Counted(
        devices=mesh.size,
        hosts=devices.hosts,
        mesh={name: size for name, size in mesh.shape.items() if size > 1},
        parameters=sum(leaf.size for leaf in jax.tree.leaves(program.base.like or like["params"])),
        state=state,
        replicated={name: n for name, n in whole.items() if n >= SHOWN},
        whole=sum(whole.values()),
        repeated=repeated(config, mesh),
        rows=data.batch_size,
        rows_of_host=(fewest, most),
        readers=readers,
        tokens=data.batch_size * data.seq_len,
        microbatches=config.optim.accumulate,
        tokens_of_device=stream,
        depth=len(model.pattern),
        compiled=len(spots(model.pattern, model.unroll)),
        model_flops=train_flops(model, data.seq_len) * data.batch_size * data.seq_len / mesh.size,
        gradients=local * (4 if config.optim.accumulate > 1 else width),
        inputs=inputs_at_once(model) * stream * model.stream_width * width,
        memory=None if peak is None or peak.gib is None else int(peak.gib * 2**30),
    )


def inputs_at_once(model: ModelConfig) -> int:
    """Sublayers whose inputs live at the same time in the backward."""
    depth, span = len(model.pattern), model.remat_span
    return depth if span == 1 else min(depth, -(-depth // span) + span - 1)


def shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Of an array with a sharding, on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _replicated(like: dict) -> dict[str, int]:
    leaves = jax.tree_util.tree_leaves_with_path(like)
    whole = {
        jax.tree_util.keystr(path, simple=True, separator="."): shard_bytes(leaf)
        for path, leaf in leaves
        if leaf.sharding.is_fully_replicated
    }
    return dict(sorted(whole.items(), key=lambda item: -item[1]))


def _shards(sizes: dict[str, int], *axes: str) -> int:
    return math.prod(sizes.get(mesh_axis, 1) for axis in axes for mesh_axis in RULES[axis])


def _rows(at, places: list, n_rows: int, seq_len: int) -> tuple[int, int, int]:
    """(fewest, most) rows that a host reads, and how many hosts read the same row, at most."""
    held: dict[int, list] = defaultdict(list)
    for device, index in at.devices_indices_map((n_rows, seq_len)).items():
        held[device.process_index].append(index)
    of_hosts = [held_rows(indices, n_rows) for indices in held.values()]
    readers = [0] * n_rows
    for rows in of_hosts:
        for row in rows:
            readers[row] += 1
    sizes = [len(rows) for rows in of_hosts]
    return min(sizes), max(sizes), max(readers)
