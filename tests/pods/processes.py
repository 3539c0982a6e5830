# SPDX-License-Identifier: Apache-2.0
"""Real processes of a cluster on this machine, which talk over loopback."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.starting import python

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "XLA_FLAGS", "KUBERNETES_", "JOB_COMPLETION_INDEX")
"""Prefixes of what this process's environment might say of a cluster."""


def clean_env(**variables: str) -> dict[str, str]:
    """This environment without what it says of clusters, with these variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
    fixed = {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "JAX_COMPILATION_CACHE_DIR": cache}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | fixed | {"TF_CPP_MIN_LOG_LEVEL": "2", "NPROC": "4", "PYTHONPATH": path} | variables


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_together(
    words: Sequence[str], envs: Sequence[Mapping[str, str]], cwd: Path, timeout: float = 120
) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of a Python program run in as many processes as there are environments."""
    running = [
        subprocess.Popen(
            python(*words), env=clean_env(**env), cwd=cwd, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True,
        )
        for env in envs
    ]  # fmt: skip
    ends = time.monotonic() + timeout
    try:
        said = [process.communicate(timeout=max(1.0, ends - time.monotonic())) for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return [(process.returncode, out, error) for process, (out, error) in zip(running, said, strict=True)]
