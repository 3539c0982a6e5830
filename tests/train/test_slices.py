# SPDX-License-Identifier: Apache-2.0
"""Several slices: the run of one device, with gradients that cross from slice to slice once a step."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from hybridlm.config import MeshConfig
from hybridlm.plan import hlo
from hybridlm.plan.collectives import KINDS
from hybridlm.plan.described import described
from hybridlm.plan.slices import slice_devices
from hybridlm.sharding import make_mesh
from hybridlm.train.step import make_program
from tests.train.conftest import first_state, make_batch, small_config

MESHES = {
    "data": MeshConfig(data=4, slice=2),
    "fsdp": MeshConfig(data=1, fsdp=2, tensor=2, slice=2),
    "context": MeshConfig(data=1, fsdp=2, context=2, slice=2),
    "four": MeshConfig(data=2, slice=4),
}


def steps_of(mesh: MeshConfig, *overrides: str):
    """Metrics of three steps, the parameters after them, bytes of a device's shards of them, the compiled step."""
    config = replace(small_config("--data.batch_size=16", *overrides), mesh=mesh)
    made = make_mesh(mesh, jax.devices()[: int(np.prod(list(vars(mesh).values())))])
    with jax.set_mesh(made):
        program = make_program(config, made)
        batches = [jax.device_put(make_batch(config, step), program.batch_sharding) for step in range(3)]
        step = program.train_step.lower(program.state_like, batches[0]).compile()
        state, seen = first_state(config, program), []
        for batch in batches:
            state, metrics = step(state, batch, program.train_step.lengths)
            seen.append({name: float(metric.value()) for name, metric in jax.device_get(metrics).items()})
    leaves = jax.tree.leaves(program.state_like["params"])
    shards = sum(4 * int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves)
    return seen, jax.device_get(state["params"]), shards, step.as_text()


CASES = [("fsdp", 2, "*"), *((name, accumulate, "M*-") for name in MESHES for accumulate in (1, 4))]


@pytest.mark.parametrize(
    ("name", "accumulate", "pattern"), [CASES[0], *(pytest.param(*c, marks=pytest.mark.slow) for c in CASES[1:])]
)
def test_slices_equal_one_device_and_gradients_cross_once(name, accumulate, pattern):
    """Of every gradient a device's shard crosses from slice to slice, whatever the microbatches, in no loop."""
    mesh, words = MESHES[name], [f"--optim.accumulate={accumulate}", f"--model.pattern={pattern}"]
    expected, params, _, _ = steps_of(MeshConfig(data=1), *words)
    found, split, shards, text = steps_of(mesh, *words)
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-3)
    crossed = crossing(text, mesh.slice, 8)
    assert set(crossed) == {1}, crossed
    n_bytes = sum(hlo.n_bytes(instruction.shape) for instruction in crossed[1])
    assert shards <= n_bytes <= shards + 400, crossed  # and a few sums over tokens


def crossing(text: str, n_slices: int, n_devices: int) -> dict[int, list[hlo.Instruction]]:
    """Collectives of a compiled program that join slices, by how often a step they run."""
    program, of_slice, found = hlo.parse(text), n_devices // n_slices, {}
    for name, instructions in program.computations.items():
        for instruction in instructions:
            if instruction.op.removesuffix("-start") not in KINDS or not program.runs[name]:
                continue
            if any(len({device // of_slice for device in group}) > 1 for group in groups_of(instruction.rest)):
                found.setdefault(program.runs[name], []).append(instruction)
    return found


def groups_of(text: str) -> list[list[int]]:
    """Devices that a collective joins, of the ways in which HLO writes them."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return [[int(d) for d in pair] for pair in re.findall(r"(\d+),(\d+)", pairs[1])]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return [[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\]\S*)\))? \{([^}]*)\}", text):
        sizes = {axis: int(size) for axis, size in re.findall(r"(\w+)'?=(\d+)", named[1])}
        joined = re.findall(r"\w+", named[3])
        order = [axis for axis in sizes if axis not in joined] + joined
        ids = iota(named[2] or f"[{np.prod(list(sizes.values()))}]").reshape(list(sizes.values()))
        ids = ids.transpose([list(sizes).index(axis) for axis in order])
        return ids.reshape(-1, int(np.prod([sizes[axis] for axis in joined]))).tolist()
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    assert counted, text
    return iota(counted[2]).reshape([int(d) for d in counted[1].split(",")]).tolist()


def iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: 0 to 7 in that shape, its dims in that order, in a row."""
    dims, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    dims = [int(d) for d in dims.split(",")]
    ids = np.arange(np.prod(dims)).reshape(dims)
    return (ids.transpose([int(d) for d in order.split(",")]) if order else ids).reshape(-1)


@pytest.mark.libtpu
def test_gradients_cross_once_a_step_between_tpus():
    """What the TPU compiler sends through hosts, from slice to slice, it sends outside of the loop of microbatches."""
    config = replace(
        small_config("--data.batch_size=64", "--optim.accumulate=4"),
        mesh=MeshConfig(data=1, fsdp=4, tensor=2, slice=2),
    )
    with described(config, slice_devices("2xv5e:2x4")) as run:
        program = hlo.parse(run.trace().lower().compile().as_text())
        leaves = jax.tree.leaves(run.program.state_like["params"])
    shards = sum(4 * int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves)
    sent = [
        (program.runs[name], hlo.n_bytes(instruction.shape))
        for name, instructions in program.computations.items()
        for instruction in instructions
        if instruction.op == "send" and "megascale" in instruction.rest
    ]
    assert sent and all(runs == 1 for runs, _ in sent), sent
    assert shards / 2 <= sum(size for _, size in sent) <= 2 * shards + 10_000, (sent, shards)  # padded to tiles


def test_groups_are_read():
    assert groups_of("replica_groups={{0,2},{1,3}}, a") == groups_of("replica_groups=[2,2]<=[2,2]T(1,0), a")
    assert groups_of("replica_groups=mesh['a'=2,'b'=2] {'a'}, b={0}") == [[0, 2], [1, 3]]
    turned = "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, c"
    assert groups_of(turned) == [[0, 1], [2, 3]]
    assert groups_of("source_target_pairs={{0,1},{1,0}}, c") == [[0, 1], [1, 0]]
