# SPDX-License-Identifier: Apache-2.0
"""The one place of `pallas_kernels` that knows of differences between JAX versions (0.10.2 and 0.11.2)."""

import contextlib

import jax


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
    if device is None:
        name = jax.default_backend()
    else:
        name = device if isinstance(device, str) else device.platform
    name = name.split(":")[0].lower()
    return "gpu" if name in ("cuda", "rocm") else name
