# SPDX-License-Identifier: Apache-2.0
"""The one place of `pallas_kernels` that knows of differences between JAX versions (0.10.2 and 0.11.2)."""

import contextlib
import os
import warnings

import jax
import jaxlib
import numpy as np


@contextlib.contextmanager
def enable_x64(enabled: bool = True):
    """Context in which float64 is available: the oracles of the tests run in it."""
    if hasattr(jax, "enable_x64"):
        with jax.enable_x64(enabled):
            yield
    else:
        from jax.experimental import enable_x64 as experimental_enable_x64

        with experimental_enable_x64(enabled):
            yield


def default_device_platform() -> str:
    """Platform of the default device: "cpu", "gpu" or "tpu"."""
    device = jax.config.jax_default_device
    name = jax.default_backend() if device is None else getattr(device, "platform", device)
    name = name.split(":")[0].lower()
    return "gpu" if name in ("cuda", "rocm") else name


def tpu_generation() -> str | None:
    """ "v5e", "v5p", "v6e", ... of the device that Pallas compiles for, the mesh's or the default; else None."""
    from jax.experimental.pallas import tpu as pltpu

    return str(pltpu.get_tpu_info().chip_version) if pltpu.is_tpu_device() else None


def gpu_capability() -> str | None:
    """Compute capability of the default device, "9.0" for Hopper; None where it is no NVIDIA GPU."""
    device = jax.config.jax_default_device
    device = device if hasattr(device, "compute_capability") else jax.local_devices()[0]
    return str(device.compute_capability) if hasattr(device, "compute_capability") else None


def automatic_axes() -> tuple[str, ...]:
    """Axes of the mesh at hand over which the compiler, not a shard_map, splits arrays; none where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = jax.sharding.AxisType.Manual
    kinds = () if mesh.empty else zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind != manual and mesh.shape[name] > 1)


def vary_alike(tree):
    """`tree` with its arrays varying over the same axes of a shard_map that checks it (check_vma), else as it is.

    A custom gradient must vary as its argument does, and a gradient with respect to parameters, equal on all devices,
    of tokens that are not, would not; so made, JAX itself sums it over the devices.
    """
    axes = frozenset().union(*map(_varying, jax.tree.leaves(tree)))

    def vary(leaf):
        missing = tuple(axes - _varying(leaf)) if isinstance(leaf, (jax.Array, np.ndarray)) else ()
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree) if axes else tree


@contextlib.contextmanager
def unchecked_varying():
    """Within, a shard_map does not check over which of its axes arrays vary: for kernels that add to a reference.

    Results count as the same on all devices until `vary_alike` says otherwise.
    """
    from jax._src import config  # no public name turns the check off but shard_map's own argument

    with config._check_vma(False):
        yield


def call_varying(call, *arrays):
    """call(*arrays) of a kernel: under a checked shard_map its results vary over the axes that its arrays vary over."""
    with unchecked_varying():  # within, a product varies over nothing; XLA leaves out one with 1
        results = call(*(array * np.ones((), array.dtype) if _varying(array) else array for array in arrays))
    return vary_alike((results, arrays))[0]


def _varying(leaf) -> frozenset:
    return jax.typeof(leaf).manual_axis_type.varying if isinstance(leaf, jax.Array) else frozenset()


def avoid_faulty_cpu_fusions() -> None:
    """Turns off XLA's YNNPACK fusions on CPU where they are faulty; runs when the package is imported.

    jaxlib 0.10 puts reductions and small products into fusions that read and write memory that is not theirs: wrong
    results, and now and then a crash. A sum over the second of two blocked axes, `b.sum(-3)` of [..., 2, 16, 2, 16],
    is enough. jaxlib 0.11 is right. XLA reads the flag when JAX first computes, so later it can only be warned of.
    """
    flag = "--xla_cpu_experimental_ynn_fusion_type="
    flags = os.environ.get("XLA_FLAGS", "")
    if tuple(map(int, jaxlib.__version__.split(".")[:2])) >= (0, 11) or flag in flags:
        return
    os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
    from jax._src import xla_bridge  # no public name says whether JAX has started

    if xla_bridge.backends_are_initialized() and default_device_platform() == "cpu":
        warnings.warn(
            f"JAX computed before pallas_kernels was imported: on CPU, jaxlib {jaxlib.__version__} may give wrong "
            f"results; import pallas_kernels or hybridlm first, set XLA_FLAGS={flag}, or use jaxlib 0.11",
            stacklevel=3,
        )
