# SPDX-License-Identifier: Apache-2.0
"""Choice of implementation: auto falls back and says so once, a named one that cannot serve raises."""

import functools
import importlib
import logging
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import assume_platform, causal_conv1d, compat, layouts, op, ops, platform, segments, ssd
from pallas_kernels.compat import enable_x64
from pallas_kernels.ops import NAMES, OPS

pytestmark = pytest.mark.quick
X, W = jnp.ones((1, 5, 3)), jnp.ones((3, 4))


@pytest.fixture
def kernel(monkeypatch):
    """A gpu kernel for causal_conv1d that serves up to 4 taps, with any JAX."""
    monkeypatch.setattr(compat, "why_too_old", lambda oldest: None)
    module = types.ModuleType("pallas_kernels.ops.causal_conv1d.gpu.api")
    module.__spec__ = types.SimpleNamespace(name=module.__name__)
    module.supports = lambda x, w, b, **_: None if w.shape[1] <= 4 else f"taps of w_DW ({w.shape[1]}) above 4"
    module.causal_conv1d_gpu = lambda x, w, b, **_: jnp.full_like(x, 7.0)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_auto_is_xla_where_no_kernel_is_proven_and_logs_once(caplog, monkeypatch):
    monkeypatch.setattr(op, "_logged", set())
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        np.testing.assert_array_equal(causal_conv1d(X, W), causal_conv1d(X, W, implementation="xla"))
        causal_conv1d(X, W)
    assert [record.getMessage() for record in caplog.records] == [
        "causal_conv1d: auto uses xla on cpu (no cpu kernel of it is proven faster)"
    ]


def test_auto_takes_a_proven_kernel_and_falls_back_where_it_cannot_serve(kernel, caplog, monkeypatch):
    monkeypatch.setattr(op, "_logged", set())
    with assume_platform("gpu"), caplog.at_level(logging.INFO, "pallas_kernels"):
        assert np.all(causal_conv1d(X, W) == 7.0)
        assert not np.any(causal_conv1d(X, jnp.ones((3, 5))) == 7.0)
    assert "auto uses gpu on gpu" in caplog.text
    assert "auto uses xla on gpu (the gpu kernel cannot serve this call: taps of w_DW (5) above 4)" in caplog.text


def test_auto_is_xla_where_the_compiler_splits_arrays(kernel, caplog, monkeypatch):
    """Kernels cannot be split by the compiler, so auto takes them in a shard_map over all axes only."""
    monkeypatch.setattr(op, "_logged", set())
    mesh = jax.make_mesh((1, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec()

    def in_shard_map(x):
        return jax.shard_map(lambda x: causal_conv1d(x, W), in_specs=spec, out_specs=spec, check_vma=False)(x)

    with assume_platform("gpu"), caplog.at_level(logging.INFO, "pallas_kernels"), jax.set_mesh(mesh):
        assert not np.any(jax.jit(lambda x: causal_conv1d(x, W))(X) == 7.0)
        assert np.all(jax.jit(in_shard_map)(X) == 7.0)
    assert (
        "auto uses xla on gpu (outside of a shard_map over mesh axes (tensor) a kernel cannot be split)" in caplog.text
    )


@pytest.mark.parametrize(("generation", "choice"), [("v5e", "tpu"), ("v4", "xla"), (None, "xla")])
def test_auto_on_a_tpu_goes_by_its_generation(generation, choice, caplog, monkeypatch):
    monkeypatch.setattr(op, "_logged", set())
    kinds = [((1, 8, 2, 64), jnp.bfloat16), ((1, 8, 2), jnp.float32), ((2,), jnp.float32)]
    args = [jax.ShapeDtypeStruct(*kind) for kind in (*kinds, *[((1, 8, 1, 128), jnp.bfloat16)] * 2)]
    with assume_platform("tpu", generation=generation), caplog.at_level(logging.INFO, "pallas_kernels"):
        assert op.select(OPS["ssd"], "auto", args, {}) is OPS["ssd"].implementations[choice]
        odd = [jax.ShapeDtypeStruct((1, 8, 2, 48), jnp.bfloat16), *args[1:]]
        assert op.select(OPS["ssd"], "auto", odd, {}) is OPS["ssd"].implementations["xla"]
    assert ("assume_platform('tpu', generation='v5e')" in caplog.text) == (generation is None)


def test_a_named_kernel_raises_where_it_cannot_serve(kernel):
    with pytest.raises(
        NotImplementedError,
        match=r"implementation \('gpu'\) of causal_conv1d needs that platform, the default is 'cpu'",
    ):
        causal_conv1d(X, W, implementation="gpu")
    with assume_platform("gpu"):
        assert np.all(causal_conv1d(X, W, implementation="gpu") == 7.0)
        with pytest.raises(NotImplementedError, match=r"taps of w_DW \(5\) above 4"):
            causal_conv1d(X, jnp.ones((3, 5)), implementation="gpu")
    with assume_platform("tpu"), pytest.raises(NotImplementedError, match="rwkv7 has no tpu kernel"):
        op.select(OPS["rwkv7"], "tpu", (), {})


@pytest.mark.parametrize(("capability", "choice"), [("9.0", "gpu"), ("8.0", "xla"), ("10.0", "xla"), (None, "gpu")])
def test_gpu_kernels_are_for_hopper(kernel, capability, choice):
    with assume_platform("gpu", capability=capability):
        assert bool(np.all(causal_conv1d(X, W) == 7.0)) == (choice == "gpu")
        if choice == "xla":
            with pytest.raises(NotImplementedError, match=rf"\({capability}\) not that of Hopper"):
                causal_conv1d(X, W, implementation="gpu")


def test_platform_follows_the_default_device():
    assert platform.platform() == "cpu"
    with jax.default_device(jax.devices("cpu")[1]):
        assert platform.default_device_platform() == "cpu"
    with assume_platform("tpu"):
        assert platform.platform() == "tpu"
    assert platform.platform() == "cpu"


def test_a_tpu_that_is_described_but_absent_must_be_named():
    """Block sizes are those of its generation, of the mesh in force or named, never those of no device."""
    shapes = [((1, 256, 16, 64), jnp.bfloat16), ((1, 256, 16), jnp.float32), ((16,), jnp.float32)]
    args = [jax.ShapeDtypeStruct(*shape) for shape in (*shapes, *[((1, 256, 1, 128), jnp.bfloat16)] * 2)]
    with assume_platform("tpu"), pytest.raises(ValueError, match=r"name it by assume_platform\('tpu', generation="):
        jax.eval_shape(functools.partial(ssd, implementation="tpu"), *args)

    def heads_a_block(generation):
        with assume_platform("tpu", generation=generation):
            text = str(jax.make_jaxpr(lambda *args: ssd(*args, implementation="tpu"))(*args))
            return text, platform.tpu_chip()

    (one_core, v5e), (two_cores, v5p) = heads_a_block("v5e"), heads_a_block("v5p")
    assert (v5e.cores, v5p.cores) == (1, 2) and one_core != two_cores
    assert platform.tpu_chip() is None


@pytest.mark.parametrize("facts", [
    {"name": "rocm"}, {"name": "gpu", "generation": "v5e"}, {"name": "tpu", "generation": "v9"},
    {"name": "tpu", "capability": "9.0"}, {"name": "cpu", "multiprocessors": 8},
])  # fmt: skip
def test_what_no_platform_has_cannot_be_assumed(facts):
    with pytest.raises(ValueError, match=r"\('?(rocm|v5e|v9|9.0|8)'?\)"), assume_platform(**facts):
        pass


def test_facts_of_a_gpu():
    assert platform.multiprocessors() == 132
    with assume_platform("gpu", capability="9.0", multiprocessors=78):
        assert (platform.gpu_capability(), platform.multiprocessors()) == ("9.0", 78)
    assert platform.peaks("NVIDIA H100 80GB HBM3")[:2] == (989.4, 3350.0)
    assert platform.peaks("NVIDIA H100 PCIe").tflops == 756.0
    assert platform.peaks("cpu") is None


@pytest.mark.parametrize("name", NAMES)
def test_modules_and_functions_of_ops_hide_nothing(name):
    package = importlib.import_module(f"pallas_kernels.ops.{name}")
    assert importlib.import_module(f"pallas_kernels.ops.{name}.api").OP is package.OP is OPS[name]
    assert isinstance(getattr(pallas_kernels.ops, name), types.ModuleType)
    assert getattr(pallas_kernels, name) is ops.function(name)
    assert OPS[name].name == name and {"reference", "xla"} <= set(OPS[name].implementations) <= set(op.IMPLEMENTATIONS)


def test_importable_alone():
    """No hybridlm, no flax, and no kernel module before it is asked for."""
    code = (
        "import sys, pallas_kernels; "
        "names = [name.split('.') for name in sys.modules]; "
        "own = [n for n in names if n[0] == 'pallas_kernels' and {'gpu', 'tpu'} & {*n}]; "
        "bad = own + [n for n in names if n[0] in ('hybridlm', 'flax')]; "
        "assert not bad, bad"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": ".", "PATH": ""}
    )


def test_document_numbers():
    ids = jnp.array([[1, 1, 0, 0, 1, 2, 0, 2, 1, 0], [0, 0, 3, 3, 0, 4, 4, 4, 0, 3], [0] * 10])
    expected = [[0, 0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1, 1, 2], [0] * 10]
    np.testing.assert_array_equal(segments.document_numbers(ids), expected)
    assert segments.document_ids(ids)[0].tolist() == [1, 1, 0, 0, 1, 2, 0, 2, 3, 0]


def test_layouts():
    for name in layouts.LAYOUTS:
        ids = layouts.make_segment_ids(name, 3, 40, seed=2)
        assert ids is None if name == "dense" else ids.shape == (3, 40) and ids.dtype == np.int32
    with pytest.raises(ValueError, match=r"layout \('diagonal'\) not one of dense"):
        layouts.make_segment_ids("diagonal", 1, 1)


def test_enable_x64_is_local():
    with enable_x64():
        assert jnp.ones(1, jnp.float64).dtype == jnp.float64
    assert jnp.ones(1).dtype == jnp.float32


def test_gpu_kernels_say_which_jax_they_are_written_for():
    """So that auto leaves them where that is not at hand."""
    found = {name: kinds["gpu"].oldest_jax for name in NAMES if "gpu" in (kinds := OPS[name].implementations)}
    assert "causal_conv1d" in found and set(found.values()) == {(0, 11)}
