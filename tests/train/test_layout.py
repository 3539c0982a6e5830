# SPDX-License-Identifier: Apache-2.0
"""Parameters as the program of a step reads them: stacked and cast once, gradients back in the state's order."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.config import MLP, Config, DataConfig, Mamba2, MeshConfig, ModelConfig, MoE, OptimConfig, Router
from hybridlm.model.init import abstract, stacked
from hybridlm.plan.slices import read_devices
from hybridlm.sharding import make_mesh
from hybridlm.train import layout, xla
from hybridlm.train.layout import UNROLL, Layout, unrolled

MODEL = ModelConfig(
    vocab_size=16, d_model=8, pattern="MM-" * 2 + "E",
    blocks={"M": Mamba2(d_state=4, d_head=4), "-": MLP(8), "E": MoE(2, 8, router=Router(1))},
)  # fmt: skip


def layout_of(model: ModelConfig) -> tuple[Layout, dict]:
    """On one device, with parameters of different numbers."""
    layout = Layout(model, make_mesh(MeshConfig(1), jax.devices()[:1]))
    rng, shapes = np.random.default_rng(0), abstract(model).shapes
    return layout, jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("unroll", [1, 8])
def test_there_and_back(unroll):
    model = replace(MODEL, unroll=unroll, compute_dtype="float32")
    layout, params = layout_of(model)
    weights = layout.stack(params)
    like = jax.tree.map(lambda a: (a.shape, a.dtype), stacked(model).shapes)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), weights) == like
    back = layout.spread(weights)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_there_and_back_apart_and_together():
    """As on GPUs: some matrices are several arrays, others one, and the arrays have all numbers once."""
    layout, params = layout_of(replace(MODEL, unroll=8, compute_dtype="float32"))
    layout = layout._replace(parts=True, joined=True)
    weights = layout.stack(params)
    assert sum(a.size for a in jax.tree.leaves(weights)) == sum(a.size for a in jax.tree.leaves(params))
    mixer = weights["groups"][0]["mixer"]
    assert mixer["in_BC"].value.shape[-1] == sum(math.prod(shape) for shape in mixer["in_BC"].shapes)
    assert mixer["in_dt"].value is None and len(mixer["in_zx"].values) == 2
    jax.tree.map(np.testing.assert_array_equal, layout.spread(weights), params)


def test_matrices_of_sublayers_alone_are_cast():
    layout, params = layout_of(replace(MODEL, unroll=1))
    weights, info = layout.stack(params), stacked(layout.config).info
    for (path, weight), leaf in zip(jax.tree_util.tree_leaves_with_path(weights), jax.tree.leaves(info), strict=True):
        path = jax.tree_util.keystr(path)
        low = "groups" in path and leaf.kind == "matrix" and "router" not in path
        assert weight.dtype == (jnp.bfloat16 if low else jnp.float32), path
    grads = layout.spread(weights)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_written_out_on_gpus_unless_the_config_says():
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1])
    assert unrolled(MODEL, mesh).unroll == UNROLL["cpu"] == 1 < UNROLL["gpu"]
    assert unrolled(replace(MODEL, unroll=3), mesh).unroll == 3


@pytest.mark.parametrize(
    ("words", "sizes", "wanted", "room", "once"),
    [
        ("h100:2", {"fsdp": 2}, None, layout.ROOM, True),
        ("h100:2", {"fsdp": 2}, None, 2**40, False),  # too large a part of the memory
        ("h100:2", {"fsdp": 2}, False, layout.ROOM, False),
        ("h100:2", {"data": 2}, None, layout.ROOM, False),
        ("v5p:2x2x1", {"fsdp": 4}, None, layout.ROOM, False),
        ("v5p:2x2x1", {"fsdp": 4}, True, layout.ROOM, True),
    ],
)
def test_gathered_once_on_gpus_with_room(words, sizes, wanted, room, once, monkeypatch):
    monkeypatch.setattr(layout, "ROOM", room)
    config = Config(model=MODEL, optim=OptimConfig(gather_once=wanted))
    mesh = make_mesh(MeshConfig(**{"data": 1} | sizes), read_devices(words).described())
    assert layout.gathers_once(config, mesh) is once


@pytest.mark.parametrize(
    ("changes", "sizes", "room", "once"),
    [
        ({}, {"fsdp": 2}, layout.ROOM, True),
        ({}, {"fsdp": 2}, 2**40, False),  # too large a part of the memory
        ({"gather_once": False, "scatter_once": True}, {"fsdp": 2}, layout.ROOM, False),  # nothing is whole
        ({"accumulate": 1}, {"fsdp": 2}, layout.ROOM, False),  # nothing is summed
        ({"scatter_once": False}, {"fsdp": 2}, layout.ROOM, False),
        ({"gather_once": True, "scatter_once": True}, {"fsdp": 2}, 2**40, True),
        ({}, {"data": 2}, layout.ROOM, False),
    ],
)
def test_scattered_once_where_gathered_once(changes, sizes, room, once, monkeypatch):
    monkeypatch.setattr(layout, "ROOM", room)
    config = Config(model=MODEL, optim=OptimConfig(**{"accumulate": 2} | changes), data=DataConfig(batch_size=4))
    mesh = make_mesh(MeshConfig(**{"data": 1} | sizes), read_devices("h100:2").described())
    assert layout.scatters_once(config, mesh) is once


@pytest.mark.parametrize(
    ("words", "changes", "sizes", "room", "tables", "devices"),
    [
        ("h100:2", {}, {"fsdp": 2}, layout.ROOM, True, 2),
        ("h100:2", {}, {"fsdp": 2}, 2**40, False, 0),  # too large a part of the memory
        ("h100:2", {"scatter_once": False}, {"fsdp": 2}, layout.ROOM, False, 0),
        ("h100:2", {"gather_once": True, "scatter_once": True}, {"fsdp": 2}, 2**40, True, 2),
        ("h100:2", {}, {"data": 2}, 2**40, True, 2),  # a device has as much as before
        ("h100:2", {}, {"context": 2}, layout.ROOM, True, 2),
        ("h100:2", {}, {"tensor": 2}, layout.ROOM, True, 1),
        ("h100:4", {}, {"data": 2, "tensor": 2}, layout.ROOM, True, 2),
        ("h100:1", {}, {}, layout.ROOM, True, 1),
        ("h100:1", {"accumulate": 1}, {}, layout.ROOM, False, 0),  # nothing is summed
        ("v5p:2x2x1", {}, {"data": 4}, layout.ROOM, False, 0),
    ],
)
def test_sums_of_devices(words, changes, sizes, room, tables, devices, monkeypatch):
    """Tables and matrices of which each device sums gradients by itself."""
    monkeypatch.setattr(layout, "ROOM", room)
    config = Config(model=MODEL, optim=OptimConfig(**{"accumulate": 2} | changes), data=DataConfig(batch_size=8))
    mesh = make_mesh(MeshConfig(**{"data": 1} | sizes), read_devices(words).described())
    made = layout.make_layout(config, MODEL, mesh, apart=False)
    assert bool(made.tables.names) is tables and made.wide == devices


@pytest.mark.parametrize(
    ("words", "sizes", "more"),
    [
        ("h100:2", {"tensor": 2}, xla.COPIED["gpu"]),
        ("h100:2", {"context": 2}, xla.COPIED["gpu"] | xla.BESIDE["gpu"]),
        ("h100:2", {"fsdp": 2}, {}),
        ("v5p:2x2x1", {"tensor": 4}, {}),
        ("v5p:2x2x1", {"context": 4}, {}),
    ],
)
def test_rows_passed_on_are_copied_by_links(words, sizes, more):
    """On GPUs with links, of one process; not between processes, whose memory is not each other's."""
    devices = read_devices(words).described()
    mesh = make_mesh(MeshConfig(**{"data": 1} | sizes), devices)
    usual = xla.OPTIONS.get("gpu" if "h100" in words else "tpu", {})
    assert (xla.options_on(mesh) or {}) == usual | more
    apart = [replace(device, process_index=i) for i, device in enumerate(devices)]
    linkless = [replace(device, device_kind="NVIDIA H100 PCIe") for device in devices if "h100" in words]
    for others in filter(None, (apart, linkless)):
        assert (xla.options_on(make_mesh(MeshConfig(**{"data": 1} | sizes), others)) or {}) == usual
