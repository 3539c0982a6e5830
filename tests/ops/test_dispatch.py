# SPDX-License-Identifier: Apache-2.0
"""Choice of implementation: auto falls back and says so once, a named one that cannot serve raises."""

import logging
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d, dispatch, layouts, segments
from pallas_kernels.compat import default_device_platform, enable_x64

pytestmark = pytest.mark.quick
X, W = jnp.ones((1, 5, 3)), jnp.ones((3, 4))


@pytest.fixture
def kernel(monkeypatch):
    """A gpu kernel for causal_conv1d that serves up to 4 taps."""
    module = types.ModuleType("pallas_kernels.ops.causal_conv1d.gpu.api")
    module.__spec__ = types.SimpleNamespace(name=module.__name__)
    module.supports = lambda x, w, b, **_: None if w.shape[1] <= 4 else f"taps of w_DW ({w.shape[1]}) above 4"
    module.causal_conv1d_gpu = lambda x, w, b, **_: jnp.full_like(x, 7.0)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dispatch, "PROVEN", frozenset({("causal_conv1d", "gpu")}))


def test_auto_is_xla_where_no_kernel_is_proven_and_logs_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        np.testing.assert_array_equal(causal_conv1d(X, W), causal_conv1d(X, W, implementation="xla"))
        causal_conv1d(X, W)
    assert [record.getMessage() for record in caplog.records] == [
        "causal_conv1d: auto uses xla on cpu (no cpu kernel of it is proven faster)"
    ]


def test_auto_takes_a_proven_kernel_and_falls_back_where_it_cannot_serve(kernel, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    with dispatch.assume_platform("gpu"), caplog.at_level(logging.INFO, "pallas_kernels"):
        assert np.all(causal_conv1d(X, W) == 7.0)
        assert not np.any(causal_conv1d(X, jnp.ones((3, 5))) == 7.0)
    assert "auto uses gpu on gpu" in caplog.text
    assert "auto uses xla on gpu (the gpu kernel cannot serve this call: taps of w_DW (5) above 4)" in caplog.text


def test_auto_is_xla_where_the_compiler_splits_arrays(kernel, caplog, monkeypatch):
    """Kernels cannot be split by the compiler, so auto takes them in a shard_map over all axes only."""
    monkeypatch.setattr(dispatch, "_logged", set())
    mesh = jax.make_mesh((1, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec()

    def in_shard_map(x):
        return jax.shard_map(lambda x: causal_conv1d(x, W), in_specs=spec, out_specs=spec, check_vma=False)(x)

    with dispatch.assume_platform("gpu"), caplog.at_level(logging.INFO, "pallas_kernels"), jax.set_mesh(mesh):
        assert not np.any(jax.jit(lambda x: causal_conv1d(x, W))(X) == 7.0)
        assert np.all(jax.jit(in_shard_map)(X) == 7.0)
    assert (
        "auto uses xla on gpu (outside of a shard_map over mesh axes (tensor) a kernel cannot be split)" in caplog.text
    )


@pytest.mark.parametrize(("generation", "choice"), [("v5e", "tpu"), ("v4", "xla"), (None, "xla")])
def test_auto_on_a_tpu_goes_by_its_generation(generation, choice, monkeypatch):
    monkeypatch.setattr(dispatch, "tpu_generation", lambda: generation)
    kinds = [((1, 8, 2, 64), jnp.bfloat16), ((1, 8, 2), jnp.float32), ((2,), jnp.float32)]
    args = [jax.ShapeDtypeStruct(*kind) for kind in (*kinds, *[((1, 8, 1, 128), jnp.bfloat16)] * 2)]
    with dispatch.assume_platform("tpu"):
        assert dispatch.select("ssd", "auto", args, {}).__name__ == f"ssd_{choice}"
        odd = [jax.ShapeDtypeStruct((1, 8, 2, 48), jnp.bfloat16), *args[1:]]
        assert dispatch.select("ssd", "auto", odd, {}).__name__ == "ssd_xla"


def test_a_named_kernel_raises_where_it_cannot_serve(kernel):
    with pytest.raises(
        NotImplementedError,
        match=r"implementation \('gpu'\) of causal_conv1d needs that platform, the default is 'cpu'",
    ):
        causal_conv1d(X, W, implementation="gpu")
    with dispatch.assume_platform("gpu"):
        assert np.all(causal_conv1d(X, W, implementation="gpu") == 7.0)
        with pytest.raises(NotImplementedError, match=r"taps of w_DW \(5\) above 4"):
            causal_conv1d(X, jnp.ones((3, 5)), implementation="gpu")
    with dispatch.assume_platform("tpu"), pytest.raises(NotImplementedError, match="selective_scan has no tpu kernel"):
        dispatch.select("selective_scan", "tpu", (), {})


@pytest.mark.parametrize(("capability", "choice"), [("9.0", "gpu"), ("8.0", "xla"), ("10.0", "xla"), (None, "gpu")])
def test_gpu_kernels_are_for_hopper(kernel, capability, choice, monkeypatch):
    monkeypatch.setattr(dispatch, "gpu_capability", lambda: capability)
    with dispatch.assume_platform("gpu"):
        assert bool(np.all(causal_conv1d(X, W) == 7.0)) == (choice == "gpu")
        if choice == "xla":
            with pytest.raises(NotImplementedError, match=rf"\({capability}\) not that of Hopper"):
                causal_conv1d(X, W, implementation="gpu")


def test_platform_follows_the_default_device():
    assert dispatch.platform() == "cpu"
    with jax.default_device(jax.devices("cpu")[1]):
        assert default_device_platform() == "cpu"
    with dispatch.assume_platform("tpu"):
        assert dispatch.platform() == "tpu"
    assert dispatch.platform() == "cpu"


def test_importable_alone():
    """No hybridlm, no flax, and no kernel module before it is asked for."""
    code = (
        "import sys, pallas_kernels; "
        "bad = [m for m in sys.modules if m.split('.')[0] in ('hybridlm', 'flax') or m.endswith(('.gpu', '.tpu'))"
        " and m.startswith('pallas_kernels')]; assert not bad, bad"
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
