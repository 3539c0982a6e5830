# SPDX-License-Identifier: Apache-2.0
"""Options of the compiler, and what it need not search for. Each is here for a measurement, beside it."""

import os

from jax.sharding import Mesh

from pallas_kernels.platform import peaks_of, platform_of

OPTIONS = {
    # More parts than cores are work without gain: hybrid_tiny's step, 2 cores, JAX 0.10.2, compiled in 16.3 and 16.5
    # for 17.3 and 17.7 s of CPU time (2026-11-27); the same bits.
    "cpu": {"xla_cpu_parallel_codegen_split_count": min(os.cpu_count() or 1, 32)},
    # One H100, hybrid_1b, JAX 0.11.2: the step is as fast (50.6 k and 50.5 k tokens/s on 2026-11-25) and compiled in 33
    # instead of 47 s without a GPU; see docs/results/training-before.md.
    # What XLA merges of products of one input it cuts again, with copies: mamba2_1b, 65,536 tokens a step, 1,305 to
    # 1,317 ms with B, C and dt together (`layers.quantized.Joined`) and nothing merged, 1,324 as XLA merges them
    # (2026-11-27).
    # Products by cuBLASLt alone, which adds to another array while it writes: to the residual stream, to what another
    # product handed back, to sums of gradients. One H100, JAX 0.11.2: mamba2_1b, 65,536 tokens a step, 1,267 and 1,275
    # ms, 1,288 with Triton's and cuBLAS' products (2026-11-27); see docs/results/training-mamba.md.
    "gpu": {
        "xla_gpu_experimental_enable_fusion_autotuner": False,
        "xla_gpu_dot_merger_threshold_mb": 0,
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_enable_cublaslt": True,
    },
}
"""By platform."""

COPIED = {
    # Two H100s, hybrid_1b, tensor 2, JAX 0.11.2: engines copy what devices pass on, and no multiprocessor is taken:
    # 1,264 ms a step, 1,320 by NCCL (2026-11-27); see docs/results/tensor.md.
    "gpu": {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"},
}
"""By platform, beside OPTIONS, for meshes with tensor or context, of devices of one process with links of their own."""
BESIDE = {
    # What `pallas_kernels.ops.attention.context` has on its way beside attention: up to twelve permutes of four devices
    # at once. With one at a time XLA has one of them there, and all others alone.
    "gpu": {"xla_gpu_experimental_parallel_collective_overlap_limit": 12},
}
"""Beside COPIED, where context splits tokens."""

ONCE = {
    # LLVM's optimisation of the random numbers would take longer than all of them: hybrid_tiny, 2 cores, JAX 0.10.2.
    "cpu": {"xla_backend_optimization_level": 0},
    "gpu": OPTIONS["gpu"],
}
"""By platform, for programs that are run once."""

OF_PROCESS = {
    # LLVM unrolls loops for longer than that saves: hybrid_tiny's step, 2 cores, JAX 0.10.2, compiled in 15.2 for 19.4
    # s of CPU time, and steps are as fast; last bits differ (2026-11-27; docs/results/start-tiny.md).
    "--xla_backend_extra_options": "xla_cpu_disable_loop_unrolling",
}
"""What XLA can be told for all programs of a process alone. This is for CPUs; compilers of others read past it."""
SAID = "xla_backend_"
"""What is in flags that say how programs are compiled: those are left as they are."""

TILINGS = {
    # hybrid_1b, JAX 0.11.2, beside other work: of 70 s that its step compiled for, the search took 10 (2026-11-26).
    "NVIDIA H100 80GB HBM3": {"0.11.2": "h100-jaxlib-0.11.2.json"},
    # hybrid_125m's first step 22.9, 19.4 and 20.7 s after the command, 29.1 s while 51 of them were searched for
    # (2026-11-28; docs/results/start.md).
    "NVIDIA H200": {"0.11.2": "h200-jaxlib-0.11.2.json"},
}
"""File in `xla_tilings/` by kind of device and then version of jaxlib: see `train.tilings`, which makes it."""


def tell_process() -> None:
    """Tells XLA OF_PROCESS by XLA_FLAGS, which it reads when JAX first opens devices or computes; later it is without
    effect, and so it is where the user has said such things."""
    flags = os.environ.get("XLA_FLAGS", "")
    if SAID not in flags:
        os.environ["XLA_FLAGS"] = " ".join([flags, *(f"{flag}={value}" for flag, value in OF_PROCESS.items())]).strip()


def options(platform: str, once: bool = False) -> dict | None:
    """For `jax.jit(compiler_options=...)`; None where there are none. once: of a program that is run once."""
    return (ONCE if once else OPTIONS).get(platform)


def options_on(mesh: Mesh) -> dict | None:
    """`options` of a program that is run often, over a mesh."""
    device, processes = mesh.devices.flat[0], {device.process_index for device in mesh.devices.flat}
    platform, peak = platform_of(device), peaks_of(device)
    tensor, context = (mesh.shape.get(axis, 1) > 1 for axis in ("tensor", "context"))
    linked = len(processes) == 1 and peak is not None and peak.links is not None
    copied = COPIED.get(platform, {}) if linked and (tensor or context) else {}
    beside = BESIDE.get(platform, {}) if linked and context else {}
    return {**OPTIONS.get(platform, {}), **copied, **beside} or None
