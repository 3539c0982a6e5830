# SPDX-License-Identifier: Apache-2.0
"""A mesh axis: a field, and a word in a rule. docs/contributing/mesh-axis.md quotes it."""

import dataclasses

import jax
import pytest

from hybridlm import sharding
from hybridlm.errors import ConfigError
from hybridlm.sharding import MeshConfig, make_mesh
from tests.contributing.runs import records, small_run


@pytest.fixture
def mesh_config(monkeypatch):
    """MeshConfig with an axis `rack`, outermost: replicas in racks of GPU hosts."""
    monkeypatch.setitem(sharding.RULES, "batch", ("rack", *sharding.RULES["batch"]))
    monkeypatch.setattr(sharding, "MESH_AXES", ("rack", *sharding.MESH_AXES))
    return dataclasses.make_dataclass("MeshConfig", [("rack", int, 1)], bases=(MeshConfig,), frozen=True)


def test_it_is_the_outermost_axis(mesh_config):
    mesh = make_mesh(mesh_config(rack=2, tensor=2), jax.devices()[:8])
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == {"rack": 2, "data": 2, "tensor": 2}
    first = [device.id for device in mesh.devices[0].flat]
    assert first == [device.id for device in jax.devices()[:4]]
    assert sharding.batch_sharding(mesh).spec[0] == ("rack", "slice", "data", "fsdp", "expert")


def test_training_over_it_equals_one_device(mesh_config, tmp_path):
    one = small_run(tmp_path, mesh=mesh_config())
    run = dataclasses.replace(one.run, dir=f"{one.run.dir}-racks")
    split = dataclasses.replace(one, mesh=mesh_config(rack=2, data=1, fsdp=4), run=run)
    for alone, over_racks in zip(records(one), records(split, n_devices=8), strict=True):
        assert over_racks["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert over_racks["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)


def test_rows_that_do_not_divide_are_told(mesh_config, tmp_path):
    config = small_run(tmp_path, mesh=mesh_config(rack=8, data=1))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=4))
    with pytest.raises(ConfigError, match=r"data.batch_size \(4\) not divisible by mesh.rack \* .* \(8\)"):
        records(config, n_devices=8)
