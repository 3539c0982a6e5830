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
    """MeshConfig with an axis `slice`, outermost: replicas on TPU slices that a slower network joins."""
    monkeypatch.setitem(sharding.RULES, "batch", ("slice", *sharding.RULES["batch"]))
    monkeypatch.setattr(sharding, "MESH_AXES", ("slice", *sharding.MESH_AXES))
    return dataclasses.make_dataclass("MeshConfig", [("slice", int, 1)], bases=(MeshConfig,), frozen=True)


def test_it_is_the_outermost_axis(mesh_config):
    mesh = make_mesh(mesh_config(slice=2, tensor=2), jax.devices()[:8])
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2}
    first = [device.id for device in mesh.devices[0].flat]
    assert first == [device.id for device in jax.devices()[:4]]
    assert sharding.batch_sharding(mesh).spec[0] == ("slice", "data", "fsdp", "expert")


def test_training_over_it_equals_one_device(mesh_config, tmp_path):
    one = small_run(tmp_path, mesh=mesh_config())
    run = dataclasses.replace(one.run, dir=f"{one.run.dir}-slices")
    split = dataclasses.replace(one, mesh=mesh_config(slice=2, data=1, fsdp=4), run=run)
    for alone, over_slices in zip(records(one), records(split, n_devices=8), strict=True):
        assert over_slices["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert over_slices["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)


def test_rows_that_do_not_divide_are_told(mesh_config, tmp_path):
    config = small_run(tmp_path, mesh=mesh_config(slice=8, data=1))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=4))
    with pytest.raises(ConfigError, match=r"data.batch_size \(4\) not divisible by mesh.slice \* .* \(8\)"):
        records(config, n_devices=8)
