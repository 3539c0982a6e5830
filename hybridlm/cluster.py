# SPDX-License-Identifier: Apache-2.0
"""Whether this process is one of several, decided once: by `--cluster.*`, by JAX_* variables, by what JAX detects.

JAX detects Open MPI and Slurm by their variables, a Cloud TPU slice on GKE by its own, on a TPU VM by the metadata
server, and an indexed Job on Kubernetes; whoever started the processes needs to say nothing.
"""

import itertools
import json
import logging
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from hybridlm.errors import AgainError, ConfigError, DataError, Exit, RunError, print_line, require
from hybridlm.fields import check_fields

log = logging.getLogger(__name__)

ALONE = "--cluster.off=True computes on this host alone"
BY_HAND = "--cluster.coordinator=HOST:PORT, --cluster.processes and --cluster.index"
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "index": "JAX_PROCESS_ID",
}
"""Field -> the variable that is read where it is not given."""
Joining = Callable[[], AbstractContextManager[dict[str, Any]]]
LATER_SECONDS = 60
"""JAX's own end of waiting comes so much after ours."""
ERRORS = {kind.__name__: kind for kind in (ConfigError, RunError, DataError, AgainError)}
"""What is raised on all processes as it was on the first."""
LONGEST_WAIT = 7 * 24 * 3600
"""Seconds that processes wait for the first one."""
_calls = itertools.count()


@dataclass(frozen=True)
class ClusterConfig:
    """Which processes make the run together. What is not given is found: see hybridlm.cluster."""

    coordinator: str = ""
    """HOST:PORT of process 0, as all others reach it; empty: found."""
    processes: int | None = None
    """Processes in all; None: found."""
    index: int | None = None
    """Number of this process, 0 to processes - 1; None: found."""
    devices: tuple[int, ...] = ()
    """GPUs of this host that this process takes; empty: all, under Slurm and Open MPI the one of its local index."""
    timeout: int = 300
    """Seconds to wait for the other processes at the start."""
    off: bool = False
    """Compute on this host alone, whatever is found."""

    def __post_init__(self):
        check_fields(self, "cluster.")
        host, colon, port = self.coordinator.rpartition(":")
        if self.coordinator:
            right = bool(host and colon and port.isdecimal() and 0 < int(port) < 2**16)
            require(right, f"cluster.coordinator ({self.coordinator!r}) must be HOST:PORT, as 10.0.0.2:8476")
        n, i = self.processes, self.index
        require(n is None or n >= 1, f"cluster.processes ({n}) must be at least 1")
        require(i is None or i >= 0, f"cluster.index ({i}) must not be negative")
        require(None in (n, i) or i < n, f"cluster.index ({i}) must be less than cluster.processes ({n})")
        require(self.timeout >= 1, f"cluster.timeout ({self.timeout}) must be at least 1")
        require(min(self.devices, default=0) >= 0, f"cluster.devices ({self.devices}) must not be negative")


@dataclass(frozen=True)
class Place:
    """Where this process stands in a cluster of several."""

    found_by: str
    """Who says so, in a word."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of jax.distributed.initialize; JAX fills in what is not there."""


def join(config: ClusterConfig | None = None, joining: Joining = lambda: nullcontext({})) -> bool:
    """Joins the cluster of which this process is a part; False where it is alone. Before anything is computed.

    joining: entered while a cluster is joined, gives options of jax.distributed.initialize. Where the other processes
    do not come in time this process ends, with one line and exit code 75: JAX would abort it with a native stack.
    Raises ConfigError for flags or an environment that say too little or too much.
    """
    config = config or ClusterConfig()
    place = find_place(config)
    if place is None:
        return False
    cluster = f"cluster of {place.found_by}"
    problem = f"{cluster}: not all processes came within {config.timeout} s (cluster.timeout); start all of them again"
    late = threading.Timer(config.timeout, _leave, [problem])
    late.daemon = True
    late.start()
    try:
        with joining() as options:
            jax.distributed.initialize(
                **place.arguments, initialization_timeout=config.timeout + LATER_SECONDS, **options
            )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{cluster}: {_first_line(error)}: give {BY_HAND}, or {ALONE}") from error
    except RuntimeError as error:
        raise RunError(f"{cluster}: {_first_line(error)}") from error
    finally:
        late.cancel()
    return True


def _leave(problem: str) -> None:
    """The main thread is inside of JAX, which nothing interrupts."""
    print_line(f"error: {problem}")
    os._exit(Exit.AGAIN)


def find_place(config: ClusterConfig) -> Place | None:
    """Where this process stands; None where it is alone. Nothing is joined yet."""
    if config.off:
        return None
    config, said = _with_variables(config)
    given = {name: value for name in VARIABLES if (value := getattr(config, name)) not in ("", None)}
    found, n_found = (None, None) if len(given) == len(VARIABLES) else _detect()
    if not (given or found) or (config.processes or n_found) == 1:
        return None
    missing = [f"--cluster.{name}" for name in VARIABLES if name not in given]
    problem = f"{', '.join(said)} without {' and '.join(missing)}: give them too, or {ALONE}"
    require(found is not None or not missing, problem)
    words = {"coordinator": "coordinator_address", "processes": "num_processes", "index": "process_id"}
    arguments = {words[name]: value for name, value in given.items()}
    if config.devices:
        arguments["local_device_ids"] = list(config.devices)
    return Place(" and ".join([*([found] if found else []), *said]), arguments)


def _with_variables(config: ClusterConfig) -> tuple[ClusterConfig, list[str]]:
    """The config with what the JAX_* variables say where it says nothing; what was said, by flags and by variables."""
    said = [f"--cluster.{name}" for name in VARIABLES if getattr(config, name) not in ("", None)]
    new: dict[str, Any] = {}
    for name, variable in VARIABLES.items():
        value = os.environ.get(variable, "")
        if not value or f"--cluster.{name}" in said:
            continue
        require(name == "coordinator" or value.isdecimal(), f"{variable} ({value!r}) is not a whole number")
        new[name] = value if name == "coordinator" else int(value)
        said.append(variable)
    if "JAX_COORDINATOR_ADDRESS" not in said and not any(word.startswith("--") for word in said):
        return config, []  # a number alone announces nothing
    return replace(config, **new), said


def _detect() -> tuple[str, int] | tuple[None, None]:
    """(what JAX detects, processes there), or nothing.

    JAX joins what it detects, of one process too, which would start a service, take over SIGTERM, and under Slurm see
    one GPU of all. No public name tells the number before.
    """
    from jax._src.clusters import ClusterEnv

    indexed = "JOB_COMPLETION_INDEX" in os.environ
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for env in ClusterEnv._cluster_types:
            # JAX serves indexed Jobs; of a pod that is none it would only say why it cannot
            if env.opt_in_only_method or (env.__name__ == "K8sCluster" and not indexed):
                continue
            try:
                if env.is_env_present():
                    return env.__name__.removesuffix("Cluster"), env.get_process_count()
            except Exception as error:  # of a web request, a file, a service: whatever there is
                raise ConfigError(
                    f"this looks like a cluster ({env.__name__.removesuffix('Cluster')}), but JAX cannot tell its "
                    f"processes ({type(error).__name__}: {_first_line(error)}): give {BY_HAND}, or {ALONE}"
                ) from error
    if any("ubernetes" in str(warning.message) for warning in said):
        log.warning(
            "an indexed Job of Kubernetes, but the package kubernetes is missing (pip install kubernetes): each pod "
            "computes alone, unless %s are given",
            BY_HAND,
        )
    return None, None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def from_first(make: Callable[[], Any]) -> Any:
    """What `make()` gives on process 0, on all processes: JSON values. The others wait, for hours if need be.

    An error of process 0 is raised on all of them, with its line, so that none waits for one that has left.
    """
    if jax.process_count() == 1:
        return make()
    from orbax.checkpoint import multihost

    said, raised = {}, None
    if jax.process_index() == 0:
        try:
            said = {"value": make()}
        except Exception as error:  # whatever it is, the others hear of it before it ends this process
            kind = type(error).__name__
            said = {"error": [kind, str(error)] if kind in ERRORS else ["RunError", f"{kind}: {error}"]}
            raised = error
    # no device is kept waiting, whose collectives time out; a barrier's name is used once
    multihost.get_barrier_sync_fn()(key=f"hybridlm-first-{next(_calls)}", timeout_ms=1000 * LONGEST_WAIT)
    said = json.loads(_broadcast(json.dumps(said).encode()))
    if raised is not None:
        raise raised
    if "error" in said:
        kind, message = said["error"]
        raise ERRORS[kind](message)
    return said["value"]


def gathered(value) -> list:
    """The JSON values of all processes, in the order of the processes; each has to call it."""
    if jax.process_count() == 1:
        return [value]
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = gather(np.asarray(len(raw), np.int32))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(raw)] = raw
    return [json.loads(row[:size].tobytes()) for row, size in zip(gather(padded), sizes, strict=True)]


def one_problem(mine: str | None) -> str | None:
    """A problem that any process has, for all of them; None where none has one."""
    for process, problem in enumerate(gathered(mine)):
        if problem is not None:
            return problem if jax.process_count() == 1 else f"{problem}, says process {process}"
    return None


def agree(problem: str | None) -> None:
    """ConfigError on all processes where one of them has a problem: that of the first that has, and which it is."""
    if jax.process_count() == 1:
        require(problem is None, problem or "")
        return
    for index, message in enumerate(gathered(problem)):
        require(message is None, f"process {index} of {jax.process_count()}: {message}")


def on_all(make: Callable[[], Any]) -> Any:
    """What `make()` gives here; a ConfigError on any process is raised on all of them."""
    value, problem = None, None
    try:
        value = make()
    except ConfigError as error:
        problem = str(error)
    agree(problem)
    return value


def _broadcast(text: bytes) -> bytes:
    """The bytes of process 0, on all."""
    n = int(broadcast(np.asarray(len(text), np.int32)))
    buffer = np.zeros(n, np.uint8)
    if jax.process_index() == 0:
        buffer[:] = np.frombuffer(text, np.uint8)
    return broadcast(buffer).tobytes()


def broadcast(value: np.ndarray) -> np.ndarray:
    """The array of process 0, on all, each of which gives one of its shape and type."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return np.asarray(broadcast_one_to_all(value))


def gather(value: np.ndarray) -> np.ndarray:
    """The arrays of all processes, stacked by process."""
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(value, tiled=False)).reshape(jax.process_count(), *np.shape(value))
