# SPDX-License-Identifier: Apache-2.0
"""GPUs that are not there, for the CUDA compiler of `jax[cuda13]`."""

from importlib.util import find_spec
from typing import NamedTuple

import jax
from jax.experimental import topologies

from hybridlm.errors import ConfigError, require


class Gpu(NamedTuple):
    """A GPU of compute capability 9.0, as its driver says."""

    kind: str
    memory: int
    """Bytes."""
    bandwidth: int
    """Bytes a second."""
    cores: int = 132


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    "h200": Gpu("NVIDIA H200", 150_121_545_728, 4_800_000_000_000),
}
TARGET = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{kind}"
"""
"""A device of compute capability 9.0 as XLA reads it, for what it does not ask of a device at hand."""


def gpu_devices(name: str, hosts: int, per_host: int) -> list:
    """Described GPUs. name: of GPUS. ConfigError where the CUDA compiler is not installed."""
    words = f"{name}:{hosts * per_host}"
    require(
        any(map(find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))),
        f"topology ({words!r}) needs the CUDA compiler to lower and compile: pip install 'jax[cuda13]', or ask for "
        "--stage counted",
    )
    target = TARGET.format(**GPUS[name]._asdict())
    jax.devices("cpu")  # loads the plugin, which asks for no GPU
    try:
        described = topologies.get_topology_desc(name, "cuda", target_config=target, topology=f"1x{hosts}x{per_host}")
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"topology ({words!r}): {str(error).splitlines()[0]}") from error
    return list(described.devices)
