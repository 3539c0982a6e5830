# SPDX-License-Identifier: Apache-2.0
"""What a command does before it computes: joins a cluster, keeps compiled programs, quiets libraries."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridlm.cluster import ClusterConfig

FRAMES = "jax_traceback_in_locations_limit"
"""How many lines of source JAX names for an operation: the one that it is from, not the 30 that called it. XLA sorts
and prints those of each instruction when it makes a program and when it loads it: docs/results/start.md."""


def start(
    cluster: ClusterConfig | None = None,
    joining: Callable[[], AbstractContextManager[dict]] = lambda: nullcontext({}),
) -> None:
    """Joins the cluster of which this process is a part; keeps compiled programs between starts; quiets libraries.

    cluster: what the user says of it; None: nothing. joining: see hybridlm.cluster.join.
    """
    import jax

    from hybridlm.cluster import join

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="Sharding info not provided", category=UserWarning)
    warnings.filterwarnings("ignore", message="coroutine .*write_fragment.* was never awaited", category=RuntimeWarning)
    sys.unraisablehook = without_late_writes(sys.unraisablehook)
    if FRAMES.upper() not in os.environ:
        jax.config.update(FRAMES, 1)
    flags: Any = jax.config  # whose values its type does not name
    if not flags.jax_compilation_cache_dir:
        _keep_programs(Path("~/.cache/hybridlm/xla").expanduser())
    join(cluster, joining)


def kept_steps() -> Path | None:
    """Folder of compiled steps, beside JAX's own compiled programs; None where these are kept nowhere, or elsewhere, or
    HYBRIDLM_KEEP_STEPS is 0, as it has to be where code is changed without its files, as tests do."""
    import jax

    if os.environ.get("HYBRIDLM_KEEP_STEPS") == "0":
        return None

    flags: Any = jax.config  # whose values its type does not name
    folder = flags.jax_compilation_cache_dir
    return Path(folder) / "steps" if folder and "://" not in folder else None


def start_alone(command: str) -> None:
    """`start` of a command that is of one process. ConfigError where this is one of several, which nobody joins."""
    from hybridlm.cluster import ClusterConfig, find_place
    from hybridlm.errors import ConfigError

    place = find_place(ClusterConfig())
    if place is not None:
        raise ConfigError(
            f"hybridlm {command} is of one process, and this is one of several ({place.found_by}): start it in one, "
            "where --mesh.KEY=VALUE takes all devices"
        )
    start()


def _keep_programs(cache: Path) -> None:
    """Has compiled programs kept in a folder that this user alone can write; where it cannot be made, nothing is kept.
    Whoever can write there has a say in what the next start runs."""
    import jax

    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))


def without_late_writes(say: Callable) -> Callable:
    """`say`, but for what the threads of a checkpoint that cannot be written say of each array, after the save itself
    has failed in one line."""

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            say(unraisable)

    return hook
