# SPDX-License-Identifier: Apache-2.0
"""CPU with eight devices, highest matrix precision, no silent change of rank, compiled programs kept between runs.

What a machine may lack is a marker (NEEDS), so that .ci/run can pick such tests where it is there.
"""

import gc
import itertools
import os
import signal
from importlib.util import find_spec
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: tests of Ctrl-C start processes
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("NPROC", "16")  # threads of XLA: those of an interpreted GPU kernel wait for each other
os.environ.setdefault("HYBRIDLM_KEEP_STEPS", "0")  # what tests put in the place of functions is in no source
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu, where it only compiles, asks the network for no TPU
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two test processes compile for it at once

import jax
import pytest
from hypothesis import HealthCheck, settings

import pallas_kernels  # noqa: F401  before anything computes: see pallas_kernels.compat
from pallas_kernels.compat import quick_cpu_flags

if "COMPILE_AS_SHIPPED" not in os.environ:  # read when JAX first computes, and by the processes that tests start
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick_cpu_flags()}".strip()

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

settings.register_profile(
    "hybridlm", deadline=None, max_examples=20, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("hybridlm")


def on_hopper() -> bool:
    """Whether the first GPU is an H100, H200 or alike."""
    devices = [device for device in jax.devices() if device.platform in ("gpu", "cuda")]
    return bool(devices) and getattr(devices[0], "compute_capability", "") == "9.0"


NEEDS = {
    "hopper": (on_hopper, "needs a Hopper GPU"),
    "newer": (lambda: jax.__version_info__ >= (0, 11), "needs JAX 0.11"),
    "libtpu": (lambda: find_spec("libtpu") is not None, "needs the TPU compiler: pip install libtpu"),
    "cuda": (lambda: find_spec("jax_cuda13_plugin") is not None, "needs the GPU compiler: pip install 'jax[cuda13]'"),
    "buckets": (
        lambda: all(map(find_spec, ("s3fs", "moto", "flask", "flask_cors", "gcsfs", "gcp_storage_emulator"))),
        "needs clients and servers of buckets: make storage-test",
    ),
    "harness": (lambda: find_spec("lm_eval") is not None, "needs lm-evaluation-harness: make lm-eval"),
    "wandb": (lambda: getattr(find_spec("wandb"), "origin", None) is not None, "needs the package wandb: make wandb"),
    "quantize": (lambda: find_spec("qwix") is not None, "needs qwix: pip install 'hybridlm[quantize]'"),
    "mamba2_jax": (lambda: find_spec("mamba2_jax") is not None, "needs mamba2-jax: pip install mamba2-jax"),
    "parity": (lambda: all(map(find_spec, ("torch", "transformers"))), "needs torch and transformers: make parity"),
}
"""Marker -> (whether this machine has it, why a test is skipped)."""


def pytest_collection_modifyitems(items):
    """Skips tests marked with what is not here."""
    missing = {name: reason for name, (present, reason) in NEEDS.items() if not present()}
    for item in items:
        for name, reason in missing.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    """Python's search for cycles, which tracing calls all the time, comes less often and passes over what was imported:
    a twentieth of the time of all tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


_LIMIT = Path("/proc/sys/vm/max_map_count")
MAX_MAPPED = min(26_000, int(_LIMIT.read_text()) // 2 if _LIMIT.exists() else 26_000)
"""Pieces of memory with which compiled programs are let go: at most half of what Linux grants a process; some 6 GB."""
_ended = itertools.count(1)


def pytest_runtest_teardown():
    """Lets go of compiled programs now and then: each takes some ten pieces of memory, and LLVM dies of the last."""
    if next(_ended) % 10 == 0 and n_mapped() > MAX_MAPPED:
        jax.clear_caches()
        gc.collect()


def n_mapped() -> int:
    """How many pieces of memory this process has mapped; 0 where the system does not tell."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that skips itself for want of a package that NEEDS names, unmarked, would run nowhere: it fails."""
    report = yield
    unmarked = not any(item.get_closest_marker(name) for name in NEEDS)
    if unmarked and report.skipped and call.excinfo is not None and "could not import" in str(call.excinfo.value):
        report.outcome = "failed"
        report.longrepr = f"{call.excinfo.value}: mark it with one of {', '.join(NEEDS)}, see tests/conftest.py"
    return report
