# SPDX-License-Identifier: Apache-2.0
"""The one place of `pallas_kernels` that knows of differences between JAX versions (0.10.2 and 0.11.2)."""

import contextlib
import functools
import os
import warnings

import jax
import jaxlib

from pallas_kernels.platform import default_device_platform


@contextlib.contextmanager
def enable_x64(enabled: bool = True):
    """Context in which float64 is available: the oracles of the tests run in it."""
    if hasattr(jax, "enable_x64"):
        with jax.enable_x64(enabled):
            yield
    else:
        from jax.experimental import enable_x64 as experimental_enable_x64  # type: ignore[attr-defined]

        with experimental_enable_x64(enabled):
            yield


def why_too_old(oldest: tuple[int, int]) -> str | None:
    """Why this JAX is too old for what needs at least `oldest`; None where it is not."""
    if jax.__version_info__ >= oldest:
        return None
    return f"JAX ({jax.__version__}) older than {'.'.join(map(str, oldest))}, which the kernels are written for"


def imports_purely() -> bool:
    """Whether the user wants importing to change nothing of the process: PALLAS_KERNELS_PURE_IMPORT=1.

    Left out are then `avoid_faulty_cpu_fusions` and the module names of before (`pallas_kernels.moved`).
    """
    return os.environ.get("PALLAS_KERNELS_PURE_IMPORT", "0") not in ("", "0")


def avoid_faulty_cpu_fusions() -> None:
    """Turns off XLA's YNNPACK fusions on CPU where they are faulty; runs when the package is imported.

    jaxlib 0.10 puts reductions and small products into fusions that read and write memory that is not theirs: wrong
    results, and now and then a crash. A sum over the second of two blocked axes, `b.sum(-3)` of [..., 2, 16, 2, 16],
    is enough. jaxlib 0.11 is right. XLA reads the flag when JAX first computes, so later it can only be warned of.
    """
    if imports_purely():
        return
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


def ask_ptxas_once() -> None:
    """Has the version of ptxas kept by what lowers Mosaic's kernels; runs when the first of them is imported.

    JAX 0.11 starts a process to ask for it at each conversion of booleans or bytes: while `hybrid_125m` is lowered 96
    times, of 20 ms each.
    """
    if imports_purely():
        return
    try:
        from jax._src.lib import mosaic_gpu  # no public name knows of it

        ask = mosaic_gpu._mosaic_gpu_ext._get_ptxas_isa_version
        if not hasattr(ask, "cache_info"):
            mosaic_gpu._mosaic_gpu_ext._get_ptxas_isa_version = functools.cache(ask)
    except (ImportError, AttributeError):  # without a GPU's library, or another JAX
        return


def quick_cpu_flags() -> str:
    """Flags by which XLA compiles programs for CPUs in the least time, half or less, and runs them slower: for tests.

    A program is one module of LLVM's, not up to 32 side by side, each of which has what they share: a fifth less work.
    jaxlib 0.10 can also leave out its emitters of fusions; 0.11 knows no other.
    """
    flags = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11):
        flags += " --xla_cpu_use_fusion_emitters=false"
    return flags
