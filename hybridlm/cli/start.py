# SPDX-License-Identifier: Apache-2.0
"""What a command does before it computes: joins a cluster, keeps compiled programs, quiets libraries."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path


def start() -> None:
    """Joins a cluster where the environment announces one; keeps compiled programs between starts; quiets libraries."""
    import jax

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="Sharding info not provided", category=UserWarning)
    warnings.filterwarnings("ignore", message="coroutine .*write_fragment.* was never awaited", category=RuntimeWarning)
    sys.unraisablehook = without_late_writes(sys.unraisablehook)
    if not jax.config.jax_compilation_cache_dir:
        cache = Path("~/.cache/hybridlm/xla").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        places = {"num_processes": os.environ.get("JAX_NUM_PROCESSES"), "process_id": os.environ.get("JAX_PROCESS_ID")}
        jax.distributed.initialize(**{name: int(value) for name, value in places.items() if value is not None})
    elif _cluster_announced():
        jax.distributed.initialize()


def without_late_writes(say: Callable) -> Callable:
    """`say`, but for what the threads of a checkpoint that cannot be written say of each array, after the save itself
    has failed in one line."""

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            say(unraisable)

    return hook


def _cluster_announced() -> bool:
    """More than one worker of a TPU slice, or more than one task of SLURM or Open MPI: what JAX finds its way in."""
    env = os.environ
    tasks = max(int(env.get(name, "1") or 1) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    in_task = "SLURM_PROCID" in env or "OMPI_COMM_WORLD_RANK" in env
    workers = [w for w in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if w]
    return len(workers) > 1 or (tasks > 1 and in_task)
