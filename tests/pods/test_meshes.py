# SPDX-License-Identifier: Apache-2.0
"""Every product of axes lies on every slice; each host finds the rows of its own devices there."""

import collections
import itertools
import math

import jax
import numpy as np
import pytest

from hybridlm.errors import ConfigError
from hybridlm.sharding import MESH_AXES, MeshConfig, batch_sharding, make_mesh
from hybridlm.train.batches import held_rows, local_rows
from tests.pods.slices import LARGEST, ROWS, SLICES, SMALL, devices

pytestmark = pytest.mark.libtpu


def products(n: int, axes: int):
    """All sizes of so many axes whose product is n, a power of two."""
    doublings = n.bit_length() - 1
    for cuts in itertools.combinations_with_replacement(range(doublings + 1), axes - 1):
        yield tuple(2 ** (b - a) for a, b in itertools.pairwise((0, *cuts, doublings)))


@pytest.mark.parametrize("name", SLICES)
def test_every_product_of_axes_works(name):
    there = devices(name)
    axes = ("data", "fsdp", "context", "tensor") if len(there) > 64 else ("data", "fsdp", "expert", "context", "tensor")
    for sizes in products(len(there), len(axes)):
        config = MeshConfig(**dict(zip(axes, sizes, strict=True)))
        mesh = make_mesh(config, there)
        assert {axis: mesh.shape[axis] for axis in axes} == dict(zip(axes, sizes, strict=True))
        assert {device.id for device in mesh.devices.flat} == {device.id for device in there}


@pytest.mark.parametrize("name", [*LARGEST, "v5e:16x16", "v6e:16x16", "tpu7x:4x4x8"])
def test_what_cannot_fit_is_one_line_with_meshes_that_can(name):
    there = devices(name)
    n = len(there)
    for wanted in (dict(data=1, fsdp=n - 6), dict(data=3, fsdp=-1), dict(data=1, fsdp=n, tensor=2), dict(fsdp=1000)):
        with pytest.raises(ConfigError, match="nearest that fit: ") as error:
            make_mesh(MeshConfig(**wanted), there)
        offered = str(error.value).partition("nearest that fit: ")[2].split(", or ")
        assert 1 <= len(offered) <= 3
        for words in offered:
            sizes = {axis: int(size) for axis, size in (word.split() for word in words.split(" x "))}
            assert make_mesh(MeshConfig(**({"data": 1} | sizes)), there).size == n
    with pytest.raises(ConfigError, match=rf"nearest that fit: fsdp {n}, or"):
        make_mesh(MeshConfig(data=1, fsdp=n - 6), there)


def hops(a, b, extent) -> int:
    """Links between two chips of a torus."""
    apart = (abs(i - j) for i, j in zip(a.coords, b.coords, strict=True))
    return sum(min(d, size - d) for d, size in zip(apart, extent, strict=True))


@pytest.mark.parametrize("name", [name for name in SLICES if name not in SMALL])
def test_tensor_lies_on_the_nearest_neighbours(name):
    """Next along `tensor` is at most one link away; along `data`, the outermost, it is no nearer (but on tpu7x, where
    JAX gives the two devices of a chip to whichever axis is two)."""
    there = devices(name)
    extent = [1 + max(device.coords[i] for device in there) for i in range(3)]
    for tensor in (2, 4):
        mesh, far = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=tensor), there), {}
        for axis in ("tensor", "data"):
            rows = np.moveaxis(mesh.devices, MESH_AXES.index(axis), -1).reshape(-1, mesh.shape[axis])
            far[axis] = [hops(a, b, extent) for row in rows for a, b in itertools.pairwise(row)]
        assert max(far["tensor"]) <= 1, (tensor, far)
        assert "tpu7x" in name or np.mean(far["data"]) > np.mean(far["tensor"])


@pytest.mark.parametrize("words", ["2xv5e:4x4", "4xv5p:2x2x2", "2xtpu7x:2x2x2"])
def test_slices_are_the_outermost_axis(words):
    there = devices(words)
    n_slices = len({device.slice_index for device in there})
    assert n_slices == int(words.partition("x")[0])
    mixed = [*there[1::2], *there[::2]]
    for sizes in (dict(fsdp=-1), dict(fsdp=2, tensor=-1), dict(data=2, fsdp=-1, tensor=2), dict(data=-1)):
        mesh = make_mesh(MeshConfig(**({"data": 1} | sizes), slice=-1), mixed)
        assert mesh.axis_names[0] == "slice" and mesh.shape["slice"] == n_slices
        for index, part in enumerate(mesh.devices):
            assert {device.slice_index for device in part.flat} == {index}
        assert {device.id for device in mesh.devices.flat} == {device.id for device in there}
    twice = make_mesh(MeshConfig(data=1, fsdp=-1, slice=2 * n_slices), there)  # a slice may be two
    assert [len({device.slice_index for device in part.flat}) for part in twice.devices] == [1] * 2 * n_slices
    with pytest.raises(ConfigError, match=rf"mesh.slice \(1\): the {len(there)} devices are of {n_slices} slices"):
        make_mesh(MeshConfig(), there)
    with pytest.raises(ConfigError, match=rf"slice {n_slices} x fsdp 3\) needs .* fit: slice {n_slices} x .*fsdp"):
        make_mesh(MeshConfig(data=1, fsdp=3, slice=n_slices), there)
    with pytest.raises(ConfigError, match="on slices of one size"):
        make_mesh(MeshConfig(slice=-1), there[:-4])


def test_a_part_of_a_slice_that_is_no_box():
    with pytest.raises(ConfigError, match=r"mesh \(data 8\): the 8 devices cannot be arranged"):
        make_mesh(MeshConfig(), devices("v5p:4x4x4")[:7] + devices("v5p:4x4x4")[-1:])


def hosts(mesh, rows: int) -> dict[int, list[tuple[slice, ...]]]:
    """Process -> where its devices hold a [rows, 64] array."""
    found = collections.defaultdict(list)
    for device, index in batch_sharding(mesh).devices_indices_map((rows, 64)).items():
        found[device.process_index].append(index)
    return found


@pytest.mark.parametrize(("name", "sizes", "rows"), ROWS, ids=lambda value: str(value))
def test_a_host_reads_the_rows_of_its_devices(name, sizes, rows):
    mesh = make_mesh(MeshConfig(**({"data": 1} | sizes)), devices(name))
    everything = set()
    for indices in hosts(mesh, rows).values():
        read = held_rows(indices, rows)
        assert set(read) == {row for index in indices for row in range(*index[0].indices(rows))}
        assert (np.diff(read) > 0).all()
        for index in indices:  # what a device gets of what its host has read
            np.testing.assert_array_equal(read[local_rows(index, read, rows)], np.arange(*index[0].indices(rows)))
        everything |= set(read)
    assert everything == set(range(rows))
    spread = math.prod(mesh.shape[axis] for axis in ("context", "tensor"))
    n_hosts = len({device.process_index for device in mesh.devices.flat})
    per_host = mesh.size // n_hosts
    assert all(len(held_rows(i, rows)) <= rows * per_host // (mesh.size // spread) for i in hosts(mesh, rows).values())


def test_a_host_of_a_torus_holds_no_range():
    mesh = make_mesh(MeshConfig(data=1, fsdp=256), devices("v5e:16x16"))
    assert list(held_rows(hosts(mesh, 256)[0], 256)) == [0, 1, 16, 17]
    mesh = make_mesh(MeshConfig(data=1, fsdp=1024), devices("v5p:8x8x16"))
    assert list(held_rows(hosts(mesh, 1024)[0], 1024)) == [0, 16, 128, 144]


def test_meshes_on_simulated_devices():
    there = jax.devices()[:8]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, slice=2), there)  # JAX reports one: consecutive devices are a slice
    assert [device.id for device in mesh.devices[0].flat] == [device.id for device in there[:4]]
    assert make_mesh(MeshConfig(slice=-1), there).shape["slice"] == 1
