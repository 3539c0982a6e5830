# SPDX-License-Identifier: Apache-2.0
"""Several slices: the run of one device, with gradients that cross from slice to slice once a step."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from hybridlm.config import MeshConfig
from hybridlm.sharding import make_mesh
from hybridlm.train.step import make_program
from tests.train.conftest import make_batch, small_config

MESHES = {
    "data": MeshConfig(data=4, slice=2),
    "fsdp": MeshConfig(data=1, fsdp=2, tensor=2, slice=2),
    "context": MeshConfig(data=1, fsdp=2, context=2, slice=2),
    "four": MeshConfig(data=2, slice=4),
}


def program_of(mesh: MeshConfig, *overrides: str):
    config = replace(small_config("--data.batch_size=16", *overrides), mesh=mesh)
    devices = jax.devices()[: int(np.prod([abs(size) for size in vars(mesh).values()]))]
    made = make_mesh(mesh, devices)
    return config, made, make_program(config, made)


def steps_of(mesh: MeshConfig, *overrides: str):
    """Metrics of three steps, and the parameters after them."""
    config, made, program = program_of(mesh, *overrides)
    with jax.set_mesh(made):
        state, seen = program.init(), []
        for step in range(3):
            batch = jax.device_put(make_batch(config, step), program.batch_sharding)
            state, metrics = program.train_step(state, batch)
            seen.append({name: float(metric.value()) for name, metric in jax.device_get(metrics).items()})
    return seen, jax.device_get(state["params"])


QUICK = ("fsdp", 2)


@pytest.mark.parametrize(
    ("name", "accumulate"),
    [pytest.param(n, k, marks=() if (n, k) == QUICK else pytest.mark.slow) for n in MESHES for k in (1, 2)],
)
def test_slices_equal_one_device(name, accumulate):
    words = [f"--optim.accumulate={accumulate}"]
    expected, params = steps_of(MeshConfig(data=1), *words)
    found, split = steps_of(MESHES[name], *words)
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-3)


def crossing(text: str, n_slices: int, n_devices: int) -> dict[str, list[str]]:
    """Collectives of a compiled program that join slices, by the computation that they are in."""
    per_slice, found, here = n_devices // n_slices, {}, ""
    for line in text.splitlines():
        if re.match(r"(ENTRY )?%?[\w.\-]+ .*\{$", line):
            here = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
            here = "ENTRY" if line.startswith("ENTRY") else here
        op = re.search(
            r" = (\S+) (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(-start)?\(", line
        )
        if op and any(len({d // per_slice for d in group}) > 1 for group in groups_of(line)):
            found.setdefault(here, []).append(f"{op[2]} {op[1]}")
    return found


def groups_of(line: str) -> list[list[int]]:
    """Devices that a collective joins, of the two ways in which HLO writes them."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [[int(d) for d in pair.split(",")] for pair in re.findall(r"\{?([\d,]+)", pairs[1])]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return [[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    assert iota, line
    shape, dims = ([int(d) for d in iota[i].split(",")] for i in (1, 2))
    ids = np.arange(np.prod(dims)).reshape(dims)
    if iota[3]:
        ids = ids.transpose([int(d) for d in iota[3].split(",")])
    return ids.reshape(shape).tolist()


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_gradients_cross_once_a_step(accumulate):
    """Whatever the microbatches: of every gradient a device's shard, and no more, in no loop."""
    config, mesh, program = program_of(MESHES["fsdp"], f"--optim.accumulate={accumulate}")
    batch = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=program.batch_sharding)
        for name, value in make_batch(config, 0).items()
    }
    with jax.set_mesh(mesh):
        text = program.train_step.lower(program.state_like, batch).compile().as_text()
    found = crossing(text, n_slices=2, n_devices=8)
    assert set(found) == {"ENTRY"}, found
    params = jax.tree.leaves(program.state_like["params"])
    shards = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in params)
    assert shards <= sum(map(elements, found["ENTRY"])) <= shards + 100, found  # and a few sums of tokens


def elements(operation: str) -> int:
    """Numbers in the results of `all-reduce (f32[2,3], f32[])`."""
    shapes = re.findall(r"\w+\[([\d,]*)\]", operation)
    return sum(int(np.prod([int(d) for d in shape.split(",") if d])) for shape in shapes)
