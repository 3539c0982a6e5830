# SPDX-License-Identifier: Apache-2.0
"""What a start of a run was: versions, commit, command, host and devices."""

import os
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
from jax.sharding import Mesh

from pallas_kernels.platform import device_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "hybridlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu", "ml_dtypes", "qwix",
    "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cublas",
)  # fmt: skip
GIT_SECONDS = 5.0


def start_record(command: str, mesh: Mesh) -> dict:
    """JSON of this start; command: what was typed."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command.encode("utf-8", "backslashreplace").decode(),
        "host": socket.gethostname(),
        "processes": jax.process_count(),
        "devices": f"{jax.device_count()} x {device_name()}",
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "versions": {"python": sys.version.split()[0]} | versions(),
        "commit": commit(ROOT),
    }


def versions() -> dict[str, str]:
    """Of the installed packages that a run's numbers may depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(root: Path) -> str | None:
    """Commit of the checkout at a folder, with `+changes` where files differ from it; None where it is none."""

    def git(*words: str) -> str:
        env = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=GIT_SECONDS, check=True, env=env
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed somewhere below another repository
        head = git("rev-parse", "HEAD")
        return f"{head}+changes" if git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.SubprocessError):
        return None
